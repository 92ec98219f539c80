use proptest::prelude::*;

use super::*;
use crate::segment::{FIN, SCALE_MAX, URG};
use crate::tcp_state::SECOND_NS;

fn segment(flags: u8, sequence: u32, acknowledgment: u32, payload_bytes: u16) -> Segment {
    Segment {
        sequence,
        acknowledgment,
        selective: acknowledgment,
        payload_bytes,
        window: 1000,
        flags,
        ..Segment::default()
    }
}

const STRICT: Context = Context { replied: true, assured: true, liberal: false };
const LIBERAL: Context = Context { liberal: true, ..STRICT };

fn moved(effect: Effect) -> bool {
    matches!(effect, Effect::Moved { .. })
}

/// Established: the client has sent up to 101, the server up to 501, both offer 1,000 bytes.
fn established() -> Tracker {
    let mut tracker = Tracker::begin(&segment(SYN, 100, 0, 0), true).unwrap();
    assert!(moved(tracker.advance(&segment(SYN | ACK, 500, 101, 0), true, STRICT)));
    assert_eq!(tracker.state(), TcpState::SynRecv);
    assert!(moved(tracker.advance(&segment(ACK, 101, 501, 0), false, STRICT)));
    assert_eq!(tracker.state(), TcpState::Established);
    tracker
}

#[test]
fn a_connection_opens_speaks_and_closes() {
    let mut tracker = established();
    let steps = [
        (ACK, 101, 501, 300, false, TcpState::Established),
        (ACK, 501, 401, 0, true, TcpState::Established),
        (FIN | ACK, 401, 501, 0, false, TcpState::FinWait),
        (ACK, 501, 402, 0, true, TcpState::CloseWait),
        (FIN | ACK, 501, 402, 0, true, TcpState::LastAck),
        (ACK, 402, 502, 0, false, TcpState::TimeWait),
    ];
    for (flags, sequence, acknowledgment, bytes, reply, state) in steps {
        let effect = tracker.advance(&segment(flags, sequence, acknowledgment, bytes), reply, STRICT);
        assert!(moved(effect), "{state:?}: {effect:?}");
        assert_eq!(tracker.state(), state);
    }
    // The port is used again, from either side.
    assert_eq!({ tracker }.advance(&segment(SYN, 9000, 0, 0), false, STRICT), Effect::Reopen);
    assert_eq!({ tracker }.advance(&segment(SYN, 9000, 0, 0), true, STRICT), Effect::Reopen);
}

#[test]
fn both_may_open_at_once() {
    let mut tracker = Tracker::begin(&segment(SYN, 100, 0, 0), true).unwrap();
    assert!(moved(tracker.advance(&segment(SYN, 500, 0, 0), true, STRICT)));
    assert_eq!(tracker.state(), TcpState::SynSent2);
    let mut responder_first = tracker;
    assert!(moved(responder_first.advance(&segment(SYN | ACK, 100, 501, 0), false, STRICT)));
    assert!(moved(responder_first.advance(&segment(ACK, 501, 101, 0), true, STRICT)));
    assert_eq!(responder_first.state(), TcpState::Established, "the acknowledgment may be the responder's");
    assert!(moved(tracker.advance(&segment(SYN | ACK, 100, 501, 0), false, STRICT)));
    assert!(moved(tracker.advance(&segment(ACK, 501, 101, 0), true, STRICT)));
    assert!(moved(tracker.advance(&segment(ACK, 101, 501, 0), false, STRICT)));
    assert_eq!(tracker.state(), TcpState::Established);
}

#[test]
fn a_reset_must_hit() {
    let reset = |sequence| segment(RST, sequence, 0, 0);
    let mut exact = established();
    assert!(moved(exact.advance(&reset(501), true, STRICT)));
    assert_eq!(exact.state(), TcpState::Close);
    let mut close = established();
    assert!(moved(close.advance(&reset(600), true, STRICT)), "passes: the receiver will challenge it");
    assert_eq!(close.state(), TcpState::Established);
    for sequence in [400, 500, 502 + 3000, 0x8000_0000] {
        let mut blind = established();
        let effect = blind.advance(&reset(sequence), true, STRICT);
        assert!(effect == Effect::Invalid, "{sequence}: {effect:?}");
        assert_eq!(blind.state(), TcpState::Established);
    }
    // A closed port answers a SYN with sequence number 0.
    let mut refused = Tracker::begin(&segment(SYN, 100, 0, 0), true).unwrap();
    assert!(moved(refused.advance(&segment(RST | ACK, 0, 101, 0), true, STRICT)));
    assert_eq!(refused.state(), TcpState::Close);
}

#[test]
fn a_reset_of_a_closing_connection_passes_whatever_its_number() {
    let mut tracker = established();
    for (flags, sequence, acknowledgment, reply, state) in [
        (FIN | ACK, 101, 501, false, TcpState::FinWait),
        (ACK, 501, 102, true, TcpState::CloseWait),
        (FIN | ACK, 501, 102, true, TcpState::LastAck),
        (ACK, 102, 502, false, TcpState::TimeWait),
    ] {
        assert!(moved(tracker.advance(&segment(flags, sequence, acknowledgment, 0), reply, STRICT)));
        assert_eq!(tracker.state(), state);
        for (reply, sequence) in [(false, 0), (false, 102), (true, 502), (true, 0x8000_0000)] {
            let mut reset = tracker;
            assert!(moved(reset.advance(&segment(RST, sequence, 0, 0), reply, STRICT)), "{state:?} {sequence}");
            assert_eq!(reset.state(), TcpState::Close);
        }
    }
}

#[test]
fn a_reset_answers_a_challenge_to_a_connection_begun_anew() {
    // The server still believes in an older connection and challenges the SYN (RFC 5961 §4); the client resets that one.
    let mut tracker = Tracker::begin(&segment(SYN, 100, 0, 0), true).unwrap();
    assert_eq!(tracker.advance(&segment(ACK, 500, 70_000, 0), true, STRICT), Effect::Ignored);
    let reset = |sequence| segment(RST, sequence, 0, 0);
    assert_eq!({ tracker }.advance(&reset(71_000), false, STRICT), Effect::Invalid);
    assert!(moved(tracker.advance(&reset(70_000), false, STRICT)));
    assert_eq!(tracker.state(), TcpState::Close);
}

#[test]
fn a_challenge_does_not_acknowledge_the_last_fin() {
    let mut tracker = established();
    assert!(moved(tracker.advance(&segment(FIN | ACK, 101, 501, 0), false, STRICT)));
    assert!(moved(tracker.advance(&segment(FIN | ACK, 501, 102, 0), true, STRICT)));
    assert_eq!(tracker.state(), TcpState::LastAck);
    assert_eq!(tracker.advance(&segment(SYN, 9000, 0, 0), false, STRICT), Effect::Ignored);
    let ack = segment(ACK, 502, 102, 0);
    assert_eq!(tracker.advance(&ack, true, STRICT), Effect::Ignored);
    assert_eq!(tracker.state(), TcpState::LastAck);
    assert!(moved(tracker.advance(&ack, true, STRICT)), "the second one is no challenge");
    assert_eq!(tracker.state(), TcpState::TimeWait);
}

#[test]
fn two_ends_that_give_up_outside_of_the_windows_are_noticed() {
    let mut tracker = established();
    let far = |reply, context| (segment(FIN | ACK, 80_000, if reply { 101 } else { 501 }, 0), reply, context);
    for (round, (segment, reply, context), effect) in [
        (1, far(true, Context { assured: false, ..STRICT }), Effect::Invalid),
        (2, far(false, STRICT), Effect::Invalid),
        (3, far(false, STRICT), Effect::Invalid),
        (4, far(true, STRICT), Effect::InvalidEnd),
    ] {
        assert_eq!(tracker.advance(&segment, reply, context), effect, "round {round}");
    }
    assert_eq!(tracker.state(), TcpState::Established);
    // What such a packet made us forget: the SYN that its sender's answer would have been held against.
    let mut tracker = established();
    assert_eq!(tracker.advance(&segment(SYN, 70_000, 0, 0), false, STRICT), Effect::Ignored);
    assert_eq!(tracker.advance(&segment(RST, 80_000, 0, 0), false, STRICT), Effect::Invalid);
    assert_eq!(tracker.advance(&segment(SYN | ACK, 9000, 70_001, 0), true, STRICT), Effect::Ignored);
    assert_eq!(tracker.state(), TcpState::Established);
}

#[test]
fn windows_decide_unless_told_otherwise() {
    let far = segment(ACK, 101 + 5000, 501, 100);
    assert_eq!(established().advance(&far, false, STRICT), Effect::Invalid);
    assert!(moved(established().advance(&far, false, LIBERAL)));
    let unsent = segment(ACK, 101, 502, 0);
    assert_eq!(established().advance(&unsent, false, STRICT), Effect::Invalid, "acknowledges what was never sent");
    let old = segment(ACK, 101u32.wrapping_sub(3000), 501, 100);
    assert_eq!(established().advance(&old, false, STRICT), Effect::Ignored, "retransmits what was acknowledged");
    let mut picked_up = Tracker::begin(&segment(ACK, 7000, 8000, 10), true).unwrap();
    assert!(moved(picked_up.advance(&segment(ACK, 1, 7010, 60_000), true, STRICT)), "scales are unknown");
    assert!(Tracker::begin(&segment(ACK, 7000, 8000, 10), false).is_none());
}

#[test]
fn windows_are_scaled_if_both_sides_offer_it() {
    let scaled = |flags, sequence, acknowledgment, scale| Segment {
        scale,
        options: true,
        ..segment(flags, sequence, acknowledgment, 0)
    };
    for (server, passes) in [(Some(7), true), (None, false)] {
        let mut tracker = Tracker::begin(&scaled(SYN, 100, 0, Some(7)), true).unwrap();
        assert!(moved(tracker.advance(&scaled(SYN | ACK, 500, 101, server), true, STRICT)));
        assert!(moved(tracker.advance(&segment(ACK, 101, 501, 0), false, STRICT)));
        assert!(moved(tracker.advance(&segment(ACK, 501, 101, 0), true, STRICT)));
        let far = tracker.advance(&segment(ACK, 101 + 50_000, 501, 100), false, STRICT);
        assert_eq!(moved(far), passes, "{server:?}: {far:?}");
    }
}

#[test]
fn flags_that_no_tcp_sends_are_invalid() {
    for flags in [0, FIN, SYN | FIN, SYN | RST, 0x3f, URG, FIN | RST | ACK, SYN | FIN | ACK] {
        assert_eq!(established().advance(&segment(flags, 101, 501, 0), false, LIBERAL), Effect::Invalid, "{flags:#x}");
        assert!(Tracker::begin(&segment(flags, 101, 501, 0), true).is_none(), "{flags:#x}");
    }
    assert!(
        moved(established().advance(&segment(ACK | 0xc8, 101, 501, 0), false, STRICT)),
        "CWR, ECE and PSH are anyone's"
    );
}

#[test]
fn a_server_that_lost_its_connection_is_followed() {
    // The client begins anew on the same ports while we still believe in the old connection: the SYN passes as perhaps
    // retransmitted; the SYN/ACK to it says that both are ahead of us.
    let mut tracker = established();
    assert_eq!(tracker.advance(&segment(SYN, 70_000, 0, 0), false, STRICT), Effect::Ignored);
    assert_eq!(tracker.state(), TcpState::Established);
    assert!(moved(tracker.advance(&segment(SYN | ACK, 9000, 70_001, 0), true, STRICT)));
    assert_eq!(tracker.state(), TcpState::SynRecv);
    assert!(moved(tracker.advance(&segment(ACK, 70_001, 9001, 0), false, STRICT)));
    assert_eq!(tracker.state(), TcpState::Established);
}

#[test]
fn a_connection_that_only_repeats_itself_is_forgotten_sooner() {
    let mut tracker = established();
    let timeout = |effect| match effect {
        Effect::Moved { timeout_ns } => timeout_ns / SECOND_NS,
        other => panic!("{other:?}"),
    };
    assert_eq!(timeout(tracker.advance(&segment(ACK, 501, 101, 0), true, STRICT)), 5 * 24 * 3600);
    assert_eq!(
        timeout(tracker.advance(&segment(ACK, 101, 501, 10), false, STRICT)),
        300,
        "data that nobody acknowledged"
    );
    assert_eq!(timeout(tracker.advance(&segment(ACK, 501, 111, 0), true, STRICT)), 5 * 24 * 3600);
    for _ in 0..3 {
        tracker.advance(&segment(ACK, 501, 111, 0), true, STRICT);
    }
    assert_eq!(timeout(tracker.advance(&segment(ACK, 501, 111, 0), true, STRICT)), 300);
    let closed = Segment { window: 0, ..segment(ACK, 501, 111, 0) };
    assert_eq!(timeout(tracker.advance(&closed, true, STRICT)), 300, "no window");
    assert_eq!(timeout(tracker.advance(&segment(RST, 600, 0, 0), true, STRICT)), 10, "until the challenge is answered");
    let picked_up = Tracker::begin(&segment(ACK, 7000, 8000, 0), true).unwrap();
    assert_eq!(picked_up.timeout_ns(false) / SECOND_NS, 300, "picked up, and nobody has answered");
    let mut begun = Tracker::begin(&segment(SYN, 100, 0, 0), true).unwrap();
    let repeated = begun.advance(&segment(SYN, 100, 0, 0), false, Context::default());
    assert_eq!(repeated, Effect::Ignored, "a SYN repeated keeps no entry alive");
}

proptest! {
    #[test]
    fn any_segments_in_any_order_keep_their_heads(
        segments in proptest::collection::vec(any::<(u8, u32, u32, u16, u16, bool, Option<u8>)>(), 1..60),
        liberal in any::<bool>(),
    ) {
        let mut tracker = established();
        for (flags, sequence, acknowledgment, payload_bytes, window, reply, scale) in segments {
            let scale = scale.map(|scale| scale.min(SCALE_MAX));
            let segment = Segment {
                sequence, acknowledgment, selective: acknowledgment, payload_bytes, window, flags, scale,
                sack_permitted: true, options: true, fragmented: false,
            };
            tracker.advance(&segment, reply, Context { liberal, ..STRICT });
            prop_assert!(tracker.senders.iter().all(|sender| sender.scale <= SCALE_MAX));
        }
    }
}
