//! How long the CPUs of workers may take to wake up: a request to the kernel (PM QoS), for as long as the daemon runs.
//!
//! The kernel then chooses no idle state that takes longer; with 0 the CPU polls while it idles. Any other thread may have it
//! instead, but it saves no power. A request stands in a file (Linux's ABI/testing/sysfs-devices-power): there is one for each CPU,
//! whoever made it, and it outlives a daemon that is killed. The next one that asks for something on that CPU takes it back.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

const CPUS: &str = "/sys/devices/system/cpu";
/// In these files "0" stands for no request, and "n/a" for no latency at all.
const NO_REQUEST: &str = "0";
const NO_LATENCY: &str = "n/a";

/// What was asked for. Dropped, there is no request any more.
#[derive(Debug)]
pub struct ResumeLatency {
    files: Vec<PathBuf>,
}

/// The kernel takes no request for a CPU.
#[derive(Debug, thiserror::Error)]
#[error("cannot ask for a resume latency (daemon.resume_latency_us): {}: {source}", .file.display())]
pub struct NotTaken {
    file: PathBuf,
    source: io::Error,
}

impl ResumeLatency {
    /// Asks for `latency_us` (0: none) on each CPU.
    ///
    /// # Errors
    /// If one has no such file, or it may not be written to. Then there is no request on those before it either.
    pub fn ask(cpus: &[usize], latency_us: u32) -> Result<Self, NotTaken> {
        Self::ask_below(Path::new(CPUS), cpus, latency_us)
    }

    fn ask_below(directory: &Path, cpus: &[usize], latency_us: u32) -> Result<Self, NotTaken> {
        let request = if latency_us == 0 { NO_LATENCY.to_owned() } else { latency_us.to_string() };
        let mut asked = Self { files: Vec::new() };
        for cpu in cpus {
            let file = directory.join(format!("cpu{cpu}/power/pm_qos_resume_latency_us"));
            // Not created: only the kernel makes such a file.
            let written =
                OpenOptions::new().write(true).open(&file).and_then(|mut to| to.write_all(request.as_bytes()));
            written.map_err(|source| NotTaken { file: file.clone(), source })?;
            asked.files.push(file);
        }
        Ok(asked)
    }
}

impl Drop for ResumeLatency {
    fn drop(&mut self) {
        for file in &self.files {
            if let Err(error) = fs::write(file, NO_REQUEST) {
                tracing::warn!(file = %file.display(), %error, "the request for a resume latency stays");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory with these CPUs, and what each says.
    fn cpus(says: &[&str]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for (cpu, says) in says.iter().enumerate() {
            let power = directory.path().join(format!("cpu{cpu}/power"));
            fs::create_dir_all(&power).unwrap();
            fs::write(power.join("pm_qos_resume_latency_us"), format!("{says}\n")).unwrap();
        }
        directory
    }

    fn says(directory: &tempfile::TempDir, cpu: usize) -> String {
        let file = directory.path().join(format!("cpu{cpu}/power/pm_qos_resume_latency_us"));
        fs::read_to_string(file).unwrap().trim().to_owned()
    }

    #[test]
    fn it_holds_for_these_cpus_and_no_longer_than_asked() {
        for (latency_us, request) in [(0, "n/a"), (20, "20")] {
            let directory = cpus(&["0", "0", "n/a"]);
            let asked = ResumeLatency::ask_below(directory.path(), &[1, 0], latency_us).unwrap();
            assert_eq!([0, 1, 2].map(|cpu| says(&directory, cpu)), [request, request, "n/a"]);
            drop(asked);
            assert_eq!([0, 1, 2].map(|cpu| says(&directory, cpu)), ["0", "0", "n/a"]);
        }
    }

    #[test]
    fn what_a_killed_daemon_left_is_gone_after_the_next_whatever_that_asks_for() {
        for latency_us in [0, 20] {
            let directory = cpus(&["0"]);
            std::mem::forget(ResumeLatency::ask_below(directory.path(), &[0], 0).unwrap());
            drop(ResumeLatency::ask_below(directory.path(), &[0], latency_us).unwrap());
            assert_eq!(says(&directory, 0), "0");
        }
    }

    #[test]
    fn if_one_cpu_cannot_be_asked_none_is() {
        let directory = cpus(&["0"]);
        let error = ResumeLatency::ask_below(directory.path(), &[0, 7], 5).unwrap_err().to_string();
        assert!(error.contains("cpu7/power/pm_qos_resume_latency_us: No such file"), "{error}");
        assert_eq!(says(&directory, 0), "0");
    }
}
