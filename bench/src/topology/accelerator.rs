//! Whether guests run on KVM or are emulated here. A device file says nothing: where virtualisation is nested without
//! hardware help, /dev/kvm opens and a guest never starts. So a guest is booted once, with a time limit.

use std::env;
use std::fs;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use super::GuestImage;

/// How long the trial guest may take to its first line. KVM needs less than a second of it.
const TRIAL_LIMIT: Duration = Duration::from_secs(8);

/// What executes a guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// The processor, through the kernel.
    Kvm,
    /// QEMU's translator. Ten to thirty times slower; the same devices.
    Tcg,
}

impl Accelerator {
    /// The best that works here. Tried once per boot of this machine and remembered beside the image;
    /// `DREAMWIRE_ACCELERATOR=kvm` or `tcg` decides without a trial.
    #[must_use]
    pub fn detect(image: &GuestImage) -> Self {
        static DETECTED: OnceLock<Accelerator> = OnceLock::new();
        *DETECTED.get_or_init(|| match env::var("DREAMWIRE_ACCELERATOR").as_deref() {
            Ok("kvm") => Self::Kvm,
            Ok("tcg") => Self::Tcg,
            _ => remembered_or_tried(image),
        })
    }

    /// Its QEMU flags, with the processor model that goes with it.
    #[must_use]
    pub fn qemu_args(self) -> [&'static str; 4] {
        match self {
            Self::Kvm => ["-accel", "kvm", "-cpu", "host"],
            // The plainest model boots a second faster than `max`: fewer features to emulate.
            Self::Tcg => ["-accel", "tcg", "-cpu", "qemu64"],
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

fn remembered_or_tried(image: &GuestImage) -> Accelerator {
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let memory = image.directory().join("accelerator");
    for known in [Accelerator::Kvm, Accelerator::Tcg] {
        if fs::read_to_string(&memory).is_ok_and(|text| text == format!("{} {boot_id}", known.name())) {
            return known;
        }
    }
    let found = if kvm_boots(image) { Accelerator::Kvm } else { Accelerator::Tcg };
    // Only saves the next trial; a read-only directory is no harm.
    let _ = fs::write(memory, format!("{} {boot_id}", found.name()));
    found
}

fn kvm_boots(image: &GuestImage) -> bool {
    if fs::File::options().read(true).write(true).open("/dev/kvm").is_err() {
        return false;
    }
    let Ok(log) = tempfile::NamedTempFile::new() else {
        return false;
    };
    let child = Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "--", "qemu-system-x86_64"])
        .args(Accelerator::Kvm.qemu_args())
        .args(["-machine", "q35", "-m", "256", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        .arg("-kernel")
        .arg(image.kernel())
        .arg("-initrd")
        .arg(image.initramfs())
        .args(["-append", "console=ttyS0 quiet panic=-1 dreamwire.probe", "-serial"])
        .arg(format!("file:{}", log.path().display()))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0)
        .spawn();
    let Ok(mut child) = child else {
        return false;
    };
    let deadline = Instant::now() + TRIAL_LIMIT;
    let mut booted = false;
    while !booted && Instant::now() < deadline {
        let ended = child.try_wait().is_ok_and(|status| status.is_some());
        booted = fs::read_to_string(log.path()).is_ok_and(|text| text.contains("dreamwire: boots"));
        if ended {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let _ = child.kill();
    let _ = child.wait();
    booted
}
