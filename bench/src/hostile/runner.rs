//! Puts a target to every case and says what became of it.
//!
//! A first round makes one case in four, unobserved: what a target allocates once it has allocated then. In
//! the second each outcome is looked at, and around it descriptors and memory are counted.

use std::time::{Duration, Instant};

use super::attack::{Attack, PATIENCE, ask, frame, receives, reset_ring, small, submit_frame};
use super::tally::Counted;
use super::target::Target;
use super::witness::{Testimony, Witness};
use super::{Case, Failure, Outcome};
use crate::front_end::{FrontEnd, Options};

/// What dreamwire says about rings is up to 100 ms old.
const FRESH: Duration = Duration::from_millis(110);
/// Every kind of case has more than this many.
const WARM_UP_STEP: usize = 4;
/// How long an innocent frame may take before the target counts as hung.
const HUNG: Duration = Duration::from_secs(5);

/// What became of the target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The session goes on.
    Survived,
    /// A ring is quarantined, everything else goes on.
    Quarantined,
    /// The connection was closed.
    Disconnected,
    /// It lives, but some port does not work any more.
    Hung(String),
    /// The process has ended.
    Crashed(String),
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Survived => write!(formatter, "survived"),
            Self::Quarantined => write!(formatter, "quarantined"),
            Self::Disconnected => write!(formatter, "disconnected"),
            Self::Hung(what) => write!(formatter, "hung: {what}"),
            Self::Crashed(how) => write!(formatter, "crashed: {how}"),
        }
    }
}

/// One case's end.
#[derive(Clone, Debug)]
pub struct Row {
    /// The case's name.
    pub name: String,
    /// Where it comes from.
    pub class: &'static str,
    /// What became of the target.
    pub verdict: Verdict,
    /// What is wrong about it: the target's answer, or another outcome than the table's.
    pub problem: Option<String>,
    /// How long it took.
    pub took: Duration,
}

/// All of it.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// In the corpus's order.
    pub rows: Vec<Row>,
    /// One per start of the target: more than one if it crashed or hung.
    pub testimonies: Vec<Testimony>,
    /// Open descriptors before and after.
    pub descriptors: (usize, usize),
    /// Resident anonymous memory before and after, KiB.
    pub private_kib: (u64, u64),
    /// Frames that the target says it has dropped at the innocent ports.
    pub innocent_drops: Vec<String>,
}

/// The target with everything around it.
struct Scene {
    target: Target,
    witness: Witness,
    friend: FrontEnd,
}

impl Scene {
    fn new(target: Target) -> Result<Self, Failure> {
        let witness = Witness::start(&target.socket("good1"), &target.socket("good2"))?;
        let friend = FrontEnd::connect(&target.socket("friend"), Options::default())?;
        Ok(Self { target, witness, friend })
    }
}

/// Runs all `cases` against what `start` starts, and starts it anew when it has crashed or hung. `progress` is told of
/// each row.
///
/// # Errors
/// When the target cannot be started.
pub fn run(
    cases: &[Case],
    start: impl Fn() -> Result<Target, Failure>,
    mut progress: impl FnMut(&Row),
) -> Result<Report, Failure> {
    let mut scene = Scene::new(start()?)?;
    let mut report = Report::default();
    let is_dreamwire = scene.target.is_dreamwire();
    if is_dreamwire {
        for case in cases.iter().step_by(WARM_UP_STEP) {
            let mut attack = Attack::new(scene.target.socket(case.port), &mut scene.friend);
            let _ = (case.attack)(&mut attack);
            let _ = attack.held();
        }
        recover(&mut scene, "bad").map_err(|problem| Failure::Wrong(format!("after the first round: {problem}")))?;
        settle(&scene.target);
        report.descriptors.0 = scene.target.descriptors();
        report.private_kib.0 = scene.target.private_kib();
    }
    for case in cases {
        if !scene.target.has(case.port) {
            continue;
        }
        let row = put_to(case, &mut scene);
        progress(&row);
        let is_over = matches!(row.verdict, Verdict::Hung(_) | Verdict::Crashed(_));
        report.rows.push(row);
        if is_over {
            let Scene { target, witness, friend } = scene;
            // The process first: nobody waits for answers then.
            drop(target);
            report.testimonies.push(witness.end());
            drop(friend);
            scene = Scene::new(start()?)?;
        }
    }
    settle(&scene.target);
    report.descriptors.1 = scene.target.descriptors();
    report.private_kib.1 = scene.target.private_kib();
    report.innocent_drops = scene.target.innocent_drops()?;
    report.testimonies.push(scene.witness.end());
    Ok(report)
}

/// Until the attacked ports' last sessions are gone with their threads.
fn settle(target: &Target) {
    let deadline = Instant::now() + PATIENCE;
    let is_connected = |port| target.view(port).is_ok_and(|view| view.connected);
    while (is_connected("bad") || is_connected("pairs")) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    std::thread::sleep(FRESH);
}

fn put_to(case: &Case, scene: &mut Scene) -> Row {
    let began = Instant::now();
    forget_quarantine(&scene.target, case.port);
    let before = scene.target.view(case.port).map(|view| view.connections).unwrap_or(0);
    let counted = case.tally.map(|_| count(&scene.target, case.port));
    let mut attack = Attack::new(scene.target.socket(case.port), &mut scene.friend);
    let mut problem = match (case.attack)(&mut attack) {
        Err(Failure::Wrong(text)) => Some(text),
        Err(error) if !matches!(case.outcome, Outcome::Contained | Outcome::Disconnected(_)) => Some(error.to_string()),
        _ => None,
    };
    let is_closed = attack.held().is_some_and(|front_end| ask(front_end, 1, &[], &[]).is_none());
    let mut verdict = if is_closed { Verdict::Disconnected } else { Verdict::Survived };
    if scene.target.is_dreamwire() {
        match observe(&scene.target, case, before) {
            Ok(seen) => verdict = seen.unwrap_or(verdict),
            Err(text) => problem = problem.or(Some(text)),
        }
        if let (Some(tally), Some(before)) = (case.tally, counted) {
            let judged = before.and_then(|before| {
                let after = count(&scene.target, case.port)?;
                tally.judge(&after.0.since(&before.0), &after.1.since(&before.1))
            });
            problem = problem.or(judged.err());
        }
        if let Outcome::Quarantined(_) = case.outcome
            && let Err(error) = reset_and_exchange(&mut attack)
        {
            problem = problem.or(Some(format!("not served again after its driver's reset: {error}")));
        }
    }
    drop(attack);
    if let Err(text) = recover(scene, case.port) {
        verdict = Verdict::Hung(format!("a new front-end is not served: {text}"));
    } else if !scene.witness.goes_on(HUNG) {
        verdict = Verdict::Hung("other ports stand still".into());
    }
    if let Some(how) = ended(&mut scene.target, &verdict) {
        verdict = Verdict::Crashed(how);
    }
    Row { name: case.name.clone(), class: case.class, verdict, problem, took: began.elapsed() }
}

/// Until the port is said to be sound, as it is: what the case before did must not be taken for what this one does.
fn forget_quarantine(target: &Target, port: &str) {
    let deadline = Instant::now() + PATIENCE;
    while target.view(port).is_ok_and(|view| !view.quarantined.is_empty()) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A process that dies is not gone at once.
fn ended(target: &mut Target, verdict: &Verdict) -> Option<String> {
    let deadline = Instant::now() + if matches!(verdict, Verdict::Hung(_)) { HUNG } else { Duration::ZERO };
    loop {
        if let Some(how) = target.ended() {
            return Some(how);
        }
        if Instant::now() >= deadline {
            return None;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The attacked port's counters, and those of the port on the other side.
fn count(target: &Target, port: &str) -> Result<(Counted, Counted), String> {
    let counted = |port| target.counted(port).map_err(|error| error.to_string());
    Ok((counted(port)?, counted("friend")?))
}

/// Waits until dreamwire says what the table says.
fn observe(target: &Target, case: &Case, connections_before: u64) -> Result<Option<Verdict>, String> {
    let outcome = case.outcome;
    let deadline = Instant::now() + PATIENCE;
    if matches!(outcome, Outcome::Served | Outcome::Contained) {
        std::thread::sleep(FRESH);
    }
    loop {
        let view = target.view(case.port).map_err(|error| error.to_string())?;
        let quarantined_for = |words: &str| view.quarantined.iter().any(|reason| reason.contains(words));
        let verdict = match outcome {
            Outcome::Served if view.connected && view.quarantined.is_empty() => Some(Verdict::Survived),
            Outcome::Quarantined(words) | Outcome::Lost(words) if view.connected && quarantined_for(words) => {
                Some(Verdict::Quarantined)
            }
            Outcome::Disconnected(words)
                if view.connections > connections_before && !view.connected && view.last_end.contains(words) =>
            {
                Some(Verdict::Disconnected)
            }
            Outcome::Refused(words)
                if view.connected
                    && view.quarantined.is_empty()
                    && view.warnings.iter().any(|text| text.contains(words)) =>
            {
                Some(Verdict::Survived)
            }
            Outcome::Contained if !view.quarantined.is_empty() => Some(Verdict::Quarantined),
            Outcome::Contained => return Ok(None),
            _ => None,
        };
        if verdict.is_some() {
            return Ok(verdict);
        }
        if Instant::now() > deadline {
            return Err(format!("expected {outcome:?}, got {view:?}"));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Tells the frames after a reset, one of each transmitq, from others.
const RESET_FRAME: u64 = 0x5e5e_7e5e;

/// The "VM" resets its card on the same connection, and sends.
fn reset_and_exchange(attack: &mut Attack<'_>) -> Result<(), Failure> {
    let gone = || Failure::Wrong("its session is gone".into());
    let front_end = attack.held().ok_or_else(gone)?;
    let at = front_end.take_memory(4096, 64)?;
    let pairs = front_end.pairs().len() as u32;
    let mut transmitqs = Vec::new();
    for pair in 0..pairs {
        reset_ring(front_end, 2 * pair)?;
        transmitqs.push(reset_ring(front_end, 2 * pair + 1)?);
    }
    for (number, transmitq) in (RESET_FRAME..).zip(&mut transmitqs) {
        submit_frame(transmitq, at, &frame(100, number));
        attack.friend_receives(&frame(100, number))?;
    }
    Ok(())
}

/// A new front-end at the attacked port sends a frame and receives one.
fn recover(scene: &mut Scene, port: &str) -> Result<(), String> {
    static NUMBER: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1 << 32);
    let deadline = Instant::now() + 2 * PATIENCE;
    loop {
        let mut attempt = || -> Result<(), Failure> {
            let mut front_end = FrontEnd::connect(&scene.target.socket(port), small())?;
            // Relaxed: only different numbers are wanted.
            let number = NUMBER.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let (out, back) = (frame(100, number), frame(200, number));
            // Whatever the attack flooded takes the friend's buffers first: it may have to be said again.
            let mut arrived = false;
            let patience = Instant::now() + PATIENCE;
            while !arrived {
                if Instant::now() > patience {
                    return Err(Failure::Wrong("its frame does not arrive".into()));
                }
                front_end.send_burst(&[&out])?;
                let pause = Instant::now() + Duration::from_millis(50);
                while !arrived && Instant::now() < pause {
                    let friend = &mut scene.friend;
                    let count = friend.receive_burst(|frame, _| arrived |= frame == out);
                    if count.map_err(crate::front_end::FrontEndError::from)? == 0 {
                        std::thread::sleep(Duration::from_micros(100));
                    }
                }
            }
            scene.friend.send_burst(&[&back])?;
            receives(&mut front_end, &back)?;
            front_end.stop()?;
            Ok(())
        };
        match attempt() {
            Ok(()) => return Ok(()),
            Err(_) if Instant::now() < deadline && scene.target.ended().is_none() => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(error) => return Err(error.to_string()),
        }
    }
}
