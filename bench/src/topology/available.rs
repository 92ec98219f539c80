//! Whether this machine can hold a topology at all: tests that need root, QEMU or the guest image ask first.

use std::env;
use std::process::{Command, Stdio};

use super::GuestImage;

/// What a test wants of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Needs {
    /// Root and iproute2.
    Netns,
    /// Those, QEMU and the guest image.
    Guests,
}

/// False, with a line that says why, where the needs are not met: the test then returns. `if !available(Needs::Guests) { return; }`
///
/// # Panics
/// When `DREAMWIRE_E2E=1` says that nothing may be skipped, as `scripts/test` does.
#[must_use]
pub fn available(needs: Needs) -> bool {
    let reason = missing(needs);
    if let Some(reason) = &reason {
        skip(reason);
    }
    reason.is_none()
}

/// Says in a line why a test returns without having run.
///
/// # Panics
/// When `DREAMWIRE_E2E=1` says that nothing may be skipped.
pub fn skip(reason: &str) {
    let must = env::var("DREAMWIRE_E2E").is_ok_and(|value| value == "1");
    assert!(!must, "this test cannot run here: {reason}");
    eprintln!("SKIPPED: {reason}");
}

/// What this machine lacks for it, in words that say what to run.
#[must_use]
pub fn missing(needs: Needs) -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("network namespaces need root".to_owned());
    }
    let programs: &[&str] = match needs {
        Needs::Netns => &["ip", "ethtool", "setpriv"],
        Needs::Guests => &["ip", "ethtool", "setpriv", "qemu-system-x86_64"],
    };
    if let Some(program) = programs.iter().find(|program| !runs(program)) {
        return Some(format!("`{program}` is missing; run scripts/setup"));
    }
    match needs {
        Needs::Netns => None,
        Needs::Guests => GuestImage::find().err().map(|error| error.to_string()),
    }
}

fn runs(program: &str) -> bool {
    // ethtool and setpriv print their version too; only whether they start is of interest.
    Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok()
}
