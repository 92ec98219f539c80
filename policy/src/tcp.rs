//! TCP connection state, as Linux nf_conntrack keeps it: a state per connection, a window per direction.
//!
//! Theory: of every packet the state table says which state it leads to, whether it is ignored (it may be right, and it is us
//! who are out of step: it passes and changes nothing), or invalid. A packet that would change the state is first held
//! against the windows: data may not start behind what the receiver has offered, nor end before what it has acknowledged;
//! an acknowledgment may not name what was not sent, nor lag too far behind (G. van Rooij, "Real Stateful TCP Packet
//! Filtering in IP Filter", 2000). A reset must not lie behind what its receiver has acknowledged, and in an established
//! connection must hit exactly, else the connection is kept (RFC 5961 §3). After a pick-up in the middle of a connection
//! window scales are unknown, and windows do not decide. What was let through unproven (a SYN in the middle, an
//! acknowledgment of an unknown SYN) is remembered: its answer tells who was right.
//!
//! Owned by a [`crate::Conntrack`] entry. No clock: timeouts are returned, not kept.

pub use crate::segment::Segment;
use crate::segment::{ACK, RST, SYN, after, before};
use crate::slab::Link;
pub use crate::tcp_state::TcpState;
use crate::tcp_state::{Kind, MINUTE_NS, Step, step};

/// How far an acknowledgment may lag where the window is smaller, in bytes: 64 KiB and a bit, as in van Rooij's paper.
const ACK_LAG_BYTES: u32 = 66_000;
/// Repeated identical acknowledgments after which an established connection gets the short timeout.
const REPEATS_MAX: u8 = 3;

/// For a connection that only repeats itself, or whose last data was never acknowledged.
pub(crate) const STALLED_NS: u64 = 5 * MINUTE_NS;

/// One direction: what its sender has sent, and may send.
#[derive(Debug, Clone, Copy, Default)]
struct Sender {
    /// Highest end sent.
    end: u32,
    /// Highest end that the receiver has allowed.
    end_max: u32,
    /// Largest window that this sender has advertised, scaled. 0: nothing was seen from it.
    window_max: u32,
    /// Highest acknowledgment sent.
    ack_max: u32,
    scale: u8,
    flags: u8,
}

impl Sender {
    const SCALE: u8 = 1;
    const SACK: u8 = 2;
    /// It was the first to close.
    const CLOSED_FIRST: u8 = 4;
    /// Windows do not decide.
    const LIBERAL: u8 = 8;
    const UNACKNOWLEDGED: u8 = 16;
    const ACK_SEEN: u8 = 32;

    const fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    fn from_syn(segment: &Segment) -> Self {
        let mut sender = Self::default();
        sender.restart(segment);
        sender
    }

    /// Begins anew with this segment. What options said before stays if it has none.
    fn restart(&mut self, segment: &Segment) {
        self.end = segment.end();
        self.end_max = self.end;
        self.window_max = u32::from(segment.window).max(1);
        if segment.options {
            self.scale = segment.scale.unwrap_or(0);
            self.flags &= Self::LIBERAL;
            self.flags |= if segment.scale.is_some() { Self::SCALE } else { 0 };
            self.flags |= if segment.sack_permitted { Self::SACK } else { 0 };
        }
    }
}

/// The last packet that mattered, for what it says about the next.
#[derive(Debug, Clone, Copy)]
struct Last {
    sequence: u32,
    acknowledgment: u32,
    end: u32,
    /// As sent, before scaling.
    window: u16,
    kind: Kind,
    reply: bool,
    /// Options of an ignored SYN, as a [`Sender`] has them, and these below.
    scale: u8,
    flags: u8,
}

impl Last {
    /// A SYN was ignored in LAST_ACK: an acknowledgment may be the challenge to it (RFC 5961 §4), not that of the FIN.
    const CHALLENGE: u8 = 0x40;
    /// Both sides have opened at once.
    const SIMULTANEOUS: u8 = 0x80;
}

/// A TCP connection: a cache line.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
pub(crate) struct Tracker {
    /// The initiator's, and the responder's.
    senders: [Sender; 2],
    last: Last,
    state: TcpState,
    repeats: u8,
}

impl Link for Tracker {
    fn link(&self) -> u32 {
        self.last.sequence
    }

    fn set_link(&mut self, place: u32) {
        self.last.sequence = place;
    }
}

/// What a packet did to a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effect {
    /// It belongs to the connection, which is now to be forgotten after so long.
    Moved { timeout_ns: u64 },
    /// It may belong to it; nothing changed.
    Ignored,
    /// It does not belong to it.
    Invalid,
    /// It does not belong to it, but both sides have now tried to end it: forget it within [`STALLED_NS`].
    InvalidEnd,
    /// It opens a new connection in place of this one.
    Reopen,
}

/// How a packet stands to the windows.
enum Fit {
    Inside,
    /// Harmless: an old acknowledgment.
    Stale,
    Outside,
}

/// What the connection's owner knows of it.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Context {
    /// It has gone both ways.
    pub(crate) replied: bool,
    /// Its handshake was completed.
    pub(crate) assured: bool,
    /// Windows do not decide.
    pub(crate) liberal: bool,
}

impl Tracker {
    /// A connection that begins with this packet, or is picked up at it. `None` if none can begin so.
    pub(crate) fn begin(segment: &Segment, pick_up: bool) -> Option<Self> {
        let mut initiator = Sender::from_syn(segment);
        let mut responder = Sender::default();
        match step(TcpState::None, segment.kind()?, false) {
            Step::To(TcpState::SynSent) => {}
            Step::To(_) if pick_up => {
                initiator.end_max = initiator.end.wrapping_add(initiator.window_max);
                initiator.scale = 0;
                initiator.flags = Sender::SACK | Sender::LIBERAL;
                responder.flags = Sender::SACK | Sender::LIBERAL;
            }
            _ => return None,
        }
        let last = Last {
            sequence: 0,
            acknowledgment: 0,
            end: 0,
            window: 0,
            kind: Kind::None,
            reply: false,
            scale: 0,
            flags: 0,
        };
        let mut tracker = Self { senders: [initiator, responder], last, state: TcpState::None, repeats: 0 };
        match tracker.advance(segment, false, Context::default()) {
            Effect::Moved { .. } => Some(tracker),
            _ => None,
        }
    }

    pub(crate) const fn state(&self) -> TcpState {
        self.state
    }

    /// Whether an ICMP error may quote a segment with this sequence number as sent by that side (RFC 5927 §4.1).
    pub(crate) fn may_have_sent(&self, sequence: u32, reply: bool) -> bool {
        let sender = &self.senders[usize::from(reply)];
        let receiver = &self.senders[usize::from(!reply)];
        let lag = receiver.window_max.max(ACK_LAG_BYTES);
        sender.window_max == 0
            || sender.has(Sender::LIBERAL)
            || (!after(sequence, sender.end) && after(sequence, sender.end.wrapping_sub(lag).wrapping_sub(1)))
    }

    /// Takes the next packet. `reply`: from the responder.
    #[inline]
    pub(crate) fn advance(&mut self, segment: &Segment, reply: bool, context: Context) -> Effect {
        let Some(kind) = segment.kind() else { return Effect::Invalid };
        let from = self.state;
        let mut windows_decide = true;
        let to = match step(from, kind, reply) {
            Step::Invalid => return Effect::Invalid,
            Step::Ignore if self.answers_ignored_syn(kind, segment, reply) => {
                self.catch_up(reply);
                TcpState::SynRecv
            }
            Step::Ignore => return self.ignore(kind, segment, reply),
            Step::To(TcpState::SynSent) if matches!(from, TcpState::TimeWait | TcpState::Close) => {
                return if self.is_over(reply) { Effect::Reopen } else { self.ignore(kind, segment, reply) };
            }
            Step::To(TcpState::TimeWait) if self.is_challenge(kind, reply) => {
                self.last.flags &= !Last::CHALLENGE;
                return Effect::Ignored;
            }
            Step::To(TcpState::SynSent2) => {
                self.last.flags |= Last::SIMULTANEOUS;
                TcpState::SynSent2
            }
            Step::To(TcpState::SynRecv) if reply && kind == Kind::Ack && self.last.flags & Last::SIMULTANEOUS != 0 => {
                TcpState::Established
            }
            Step::To(_) if kind == Kind::Rst => match self.reset(segment, reply, context) {
                Reset::Invalid => return Effect::Invalid,
                // RFC 5961 §3.2: the receiver answers with a challenge; until then nothing is known.
                Reset::Doubtful => from,
                Reset::Exact => TcpState::Close,
                Reset::Unchecked => {
                    windows_decide = false;
                    TcpState::Close
                }
            },
            Step::To(state) => state,
        };
        if windows_decide {
            match self.fit(kind, segment, reply, context.liberal) {
                Fit::Inside => {}
                Fit::Stale => return Effect::Ignored,
                Fit::Outside => return self.outside(kind, reply, context),
            }
        }
        self.last.kind = kind;
        self.last.reply = reply;
        self.state = to;
        if from != to && to == TcpState::FinWait {
            self.senders[usize::from(reply)].flags |= Sender::CLOSED_FIRST;
        }
        // Who only repeats a SYN cannot keep its entry for ever.
        if !context.replied && kind == Kind::Syn && from == TcpState::SynSent {
            return Effect::Ignored;
        }
        Effect::Moved { timeout_ns: self.timeout_ns(context.replied) }
    }

    /// How long it is remembered after the last packet that moved it.
    #[inline]
    pub(crate) fn timeout_ns(&self, replied: bool) -> u64 {
        let full = self.state.timeout_ns();
        if self.repeats >= REPEATS_MAX && full > STALLED_NS {
            return STALLED_NS;
        }
        if self.last.kind == Kind::Rst {
            return TcpState::Close.timeout_ns();
        }
        let unacknowledged = (self.senders[0].flags | self.senders[1].flags) & Sender::UNACKNOWLEDGED != 0;
        if unacknowledged || self.last.window == 0 || !replied { full.min(STALLED_NS) } else { full }
    }

    /// Both sides, or a reset from this one, have ended it.
    fn is_over(&self, reply: bool) -> bool {
        (self.senders[0].flags | self.senders[1].flags) & Sender::CLOSED_FIRST != 0
            || (self.last.kind == Kind::Rst && self.last.reply == reply)
    }

    /// A SYN/ACK that acknowledges a SYN that was ignored: both ends agree, and it is us who were wrong.
    fn answers_ignored_syn(&self, kind: Kind, segment: &Segment, reply: bool) -> bool {
        kind == Kind::SynAck
            && self.last.kind == Kind::Syn
            && self.last.reply != reply
            && segment.acknowledgment == self.last.end
    }

    fn is_challenge(&self, kind: Kind, reply: bool) -> bool {
        self.state == TcpState::LastAck
            && kind == Kind::Ack
            && self.last.kind == Kind::Syn
            && self.last.reply != reply
            && self.last.flags & Last::CHALLENGE != 0
    }

    /// What the ignored SYN said counts, and its answerer begins anew.
    fn catch_up(&mut self, reply: bool) {
        self.senders[usize::from(self.last.reply)] = Sender {
            end: self.last.end,
            end_max: self.last.end,
            window_max: u32::from(self.last.window).max(1),
            ack_max: 0,
            scale: self.last.scale,
            flags: self.last.flags & (Sender::SCALE | Sender::SACK),
        };
        let answerer = &mut self.senders[usize::from(reply)];
        *answerer = Sender { flags: answerer.flags & Sender::LIBERAL, ..Sender::default() };
    }

    fn ignore(&mut self, kind: Kind, segment: &Segment, reply: bool) -> Effect {
        self.last.kind = kind;
        self.last.reply = reply;
        self.last.sequence = segment.sequence;
        self.last.end = segment.end();
        self.last.window = segment.window;
        if kind == Kind::Syn && !reply {
            let syn = Sender::from_syn(segment);
            self.last.scale = syn.scale;
            self.last.flags = syn.flags | if self.state == TcpState::LastAck { Last::CHALLENGE } else { 0 };
        }
        if kind == Kind::Ack && self.state == TcpState::SynSent {
            self.last.acknowledgment = segment.acknowledgment;
        }
        Effect::Ignored
    }

    /// A packet outside of the windows. If it would have ended the connection, and so would one from the other side, then it
    /// is perhaps us who are out of step.
    fn outside(&mut self, kind: Kind, reply: bool, context: Context) -> Effect {
        let ends = |kind| matches!(kind, Kind::Fin | Kind::Rst);
        if !context.assured || !ends(kind) {
            return Effect::Invalid;
        }
        if self.last.reply != reply && ends(self.last.kind) {
            return Effect::InvalidEnd;
        }
        self.last.kind = kind;
        self.last.reply = reply;
        Effect::Invalid
    }

    fn reset(&self, segment: &Segment, reply: bool, context: Context) -> Reset {
        if self.state.is_closing() {
            return Reset::Unchecked;
        }
        let receiver = &self.senders[usize::from(!reply)];
        let last = &self.last;
        // After a SYN that was let through, what was acknowledged before says nothing.
        if receiver.has(Sender::ACK_SEEN) && last.kind != Kind::Syn {
            let established = self.state == TcpState::Established && context.assured;
            let follows_own_last = last.kind == Kind::Ack && last.reply == reply && segment.sequence == last.end;
            return match segment.sequence {
                0 if !established => Reset::Exact,
                sequence if before(sequence, receiver.ack_max) => Reset::Invalid,
                sequence if !established || sequence == receiver.ack_max || follows_own_last => Reset::Exact,
                _ => Reset::Doubtful,
            };
        }
        // Sent in answer to a SYN or ACK that was ignored, or to the challenge that was.
        let ignored = (context.replied && last.kind == Kind::Syn && last.reply != reply)
            || (!context.assured && last.kind == Kind::Ack);
        let challenged = self.state == TcpState::SynSent
            && last.kind == Kind::Ack
            && last.reply
            && segment.sequence == last.acknowledgment;
        match challenged || (ignored && segment.acknowledgment == last.end) {
            true => Reset::Unchecked,
            false => Reset::Exact,
        }
    }

    /// Holds a packet against the windows and, if it is inside, moves them.
    #[inline]
    fn fit(&mut self, kind: Kind, segment: &Segment, reply: bool, liberal: bool) -> Fit {
        let [first, second] = &mut self.senders;
        let (sender, receiver) = if reply { (second, first) } else { (first, second) };
        let mut sequence = segment.sequence;
        let mut end = segment.end();
        let mut ack = segment.acknowledgment;
        let mut sack = if receiver.has(Sender::SACK) { segment.selective } else { ack };
        let scale = if segment.has(SYN) { 0 } else { sender.scale };
        let window = u32::from(segment.window) << scale;
        if segment.fragmented {
            // Where it ends is not known: from now on this direction's windows mean nothing.
            sender.flags |= Sender::LIBERAL;
            receiver.flags |= Sender::LIBERAL;
        }

        let restart = |sender: &mut Sender, receiver: &mut Sender| {
            sender.restart(segment);
            // RFC 7323 §2.2: both or neither.
            if reply && !(sender.has(Sender::SCALE) && receiver.has(Sender::SCALE)) {
                sender.scale = 0;
                receiver.scale = 0;
            }
        };
        if sender.window_max == 0 {
            if segment.has(SYN) {
                restart(sender, receiver);
                if !segment.has(ACK) {
                    return Fit::Inside;
                }
            } else {
                sender.end = end;
                sender.window_max = window.max(1);
                sender.end_max = end.wrapping_add(sender.window_max);
                if receiver.window_max == 0 {
                    receiver.end = sack;
                    receiver.end_max = sack;
                } else if sack == receiver.end.wrapping_add(1) {
                    // A reply to a keep-alive that began with the picked-up connection.
                    receiver.end = receiver.end.wrapping_add(1);
                }
            }
        } else if segment.has(SYN)
            && after(end, sender.end)
            && matches!(self.state, TcpState::SynSent | TcpState::SynRecv)
        {
            // A SYN with another initial sequence number.
            restart(sender, receiver);
            if reply && !segment.has(ACK) {
                return Fit::Inside;
            }
        }

        if !segment.has(ACK) || (segment.has(RST) && ack == 0) {
            // Some stacks set ACK in a reset and leave the number zero.
            ack = receiver.end;
            sack = receiver.end;
        }
        // A reset that answers a SYN has no number of its own.
        if segment.has(RST) && sequence == 0 && self.state == TcpState::SynSent {
            sequence = sender.end;
            end = sender.end;
        }

        // What passes all the same teaches nothing.
        let excused = liberal || sender.has(Sender::LIBERAL);
        let or_excused = |fit| if excused { Fit::Inside } else { fit };
        let lag = sender.window_max.max(ACK_LAG_BYTES);
        let in_window = !before(end, sender.end.wrapping_sub(receiver.window_max));
        let acknowledges_unsent = after(sack, receiver.end);
        let acknowledges_late = before(sack, receiver.end.wrapping_sub(lag));
        if after(sequence, sender.end_max) {
            // Some stacks send beyond the window that they were offered. By less than a window it passes, and its
            // acknowledgment will not be one of data that was never seen.
            let beyond = end.wrapping_sub(sender.end_max).wrapping_add(1);
            let tolerable = receiver.window_max != 0 && beyond <= receiver.window_max;
            if tolerable && in_window && !acknowledges_unsent && !acknowledges_late {
                sender.end = end;
                sender.flags |= Sender::UNACKNOWLEDGED;
                return or_excused(Fit::Stale);
            }
            return or_excused(Fit::Outside);
        }
        if acknowledges_unsent {
            return or_excused(Fit::Outside);
        }
        if (receiver.window_max != 0 && !in_window) || acknowledges_late {
            return or_excused(Fit::Stale);
        }

        let advertised = window.wrapping_add(sack.wrapping_sub(ack));
        sender.window_max = sender.window_max.max(advertised);
        if after(end, sender.end) {
            sender.end = end;
            sender.flags |= Sender::UNACKNOWLEDGED;
        }
        if segment.has(ACK) && (!sender.has(Sender::ACK_SEEN) || after(ack, sender.ack_max)) {
            sender.ack_max = ack;
            sender.flags |= Sender::ACK_SEEN;
        }
        if receiver.window_max != 0 && after(end, sender.end_max) {
            receiver.window_max = receiver.window_max.wrapping_add(end.wrapping_sub(sender.end_max));
        }
        let allowed = sack.wrapping_add(window.max(1));
        if after(allowed, receiver.end_max) {
            receiver.end_max = allowed;
        }
        if ack == receiver.end {
            receiver.flags &= !Sender::UNACKNOWLEDGED;
        }
        if kind == Kind::Ack {
            let last = Last { sequence, acknowledgment: ack, end, window: segment.window, reply, ..self.last };
            let of = |last: &Last| (last.reply, last.sequence, last.acknowledgment, last.end, last.window);
            self.repeats = if of(&last) == of(&self.last) { self.repeats.saturating_add(1) } else { 0 };
            self.last = last;
        }
        Fit::Inside
    }
}

/// How a reset stands to the connection.
enum Reset {
    Exact,
    Doubtful,
    Invalid,
    /// The windows are not asked.
    Unchecked,
}

#[cfg(test)]
#[path = "tcp_tests.rs"]
mod tests;
