//! The daemon in the foreground, from its configuration file to SIGTERM.

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::api;
use crate::config::{self, Accepted, Context, Mistake};
use crate::control::{self, ApplyError, Control, ControlHandle};
use crate::resume_latency::ResumeLatency;
use crate::run_dir::{API_SOCKET, RunDir, STATS_SOCKET};

/// What the command line says.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The configuration file; without one there is a network `default`.
    pub config: Option<PathBuf>,
    /// Takes precedence over the file's.
    pub run_dir: Option<PathBuf>,
}

/// Serves until SIGTERM or SIGINT. The error is what to print: one line for each mistake.
pub fn run(options: &Options) -> Result<(), String> {
    let context = Context { run_dir: options.run_dir.as_deref(), running: None };
    let Accepted { document, warnings } = match &options.config {
        Some(file) => read(file, context).map_err(|mistakes| listing(file, &mistakes))?,
        None => config::without_file(context),
    };
    let daemon = document.daemon.clone();

    // Before any guest's memory is mapped.
    dreamwire_vhost::sigbus::install().map_err(|error| format!("cannot install the SIGBUS handler: {error}"))?;
    // Sockets before threads: see RunDir::listen.
    let mut run_dir = RunDir::claim(&daemon.run_dir).map_err(|error| error.to_string())?;
    let api = run_dir.listen(API_SOCKET, 0o600).map_err(|error| error.to_string())?;
    let stats = run_dir.listen(STATS_SOCKET, 0o666).map_err(|error| error.to_string())?;

    let mut control = Control::new(daemon.clone()).map_err(|error| {
        let cpus = match &daemon.workers[..] {
            [] => String::new(),
            cpus => format!(" on CPUs {cpus:?} (daemon.workers)"),
        };
        format!("cannot start the workers{cpus}: {error}")
    })?;
    if let Err(error) = control.apply(Accepted { document, warnings }, false) {
        control.shut_down();
        let mistakes = match error {
            ApplyError::Mistakes(mistakes) => mistakes,
            ApplyError::Host(mistake) => vec![mistake],
        };
        return Err(listing(options.config.as_deref().unwrap_or(Path::new("dreamwire")), &mistakes));
    }
    let resume_latency = daemon.resume_latency_us.map(|latency_us| ResumeLatency::ask(&daemon.workers, latency_us));
    let resume_latency = resume_latency.transpose().map_err(|error| {
        control.shut_down();
        error.to_string()
    })?;
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        run_dir = %daemon.run_dir.display(),
        api = %daemon.run_dir.join(API_SOCKET).display(),
        stats = %daemon.run_dir.join(STATS_SOCKET).display(),
        workers = ?daemon.workers,
        polling = config::document::polling_word(daemon.polling),
        "dreamwire is running"
    );

    let (handle, thread) =
        control::spawn(control).map_err(|error| format!("cannot start the control thread: {error}"))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| format!("cannot start the runtime: {error}"))?;
    let served = runtime.block_on(serve(handle.clone(), options.config.clone(), api, stats));
    // A question that a worker does not answer must not keep the daemon from ending.
    runtime.shutdown_timeout(Duration::from_secs(1));
    let ended = end(handle, thread);
    // Whoever waits for the directory asks for its own.
    drop((resume_latency, run_dir));
    served.and(ended)
}

/// Stops everything; gives up on what does not stop, the process ends anyway.
fn end(control: ControlHandle, thread: JoinHandle<()>) -> Result<(), String> {
    control.shut_down();
    let deadline = Instant::now() + STOP_MAX;
    while !thread.is_finished() {
        if Instant::now() > deadline {
            return Err(format!("a session or worker did not stop within {STOP_MAX:?}; ending all the same"));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    thread.join().map_err(|_| "the control thread has panicked; see the log".to_owned())
}

/// How long sessions and workers have for stopping. systemd's patience in `docs/dreamwire.service` is twice that.
const STOP_MAX: Duration = Duration::from_secs(5);

async fn serve(
    control: ControlHandle,
    file: Option<PathBuf>,
    api: UnixListener,
    stats: UnixListener,
) -> Result<(), String> {
    let on = |kind| signal(kind).map_err(|error| format!("cannot watch for signals: {error}"));
    let mut terminate = on(SignalKind::terminate())?;
    let mut interrupt = on(SignalKind::interrupt())?;
    let hang_up = on(SignalKind::hangup())?;
    let (api_router, stats_router) = api::routers(control.clone());
    tokio::spawn(reread_on(hang_up, control.clone(), file));
    tokio::select! {
        _ = terminate.recv() => {
            tracing::info!("SIGTERM: ending");
            Ok(())
        }
        _ = interrupt.recv() => {
            tracing::info!("SIGINT: ending");
            Ok(())
        }
        ended = api::serve(api, api_router) => Err(format!("the API socket has failed: {ended:?}")),
        ended = api::serve(stats, stats_router) => Err(format!("the statistics socket has failed: {ended:?}")),
        () = control.ended() => Err("the control thread has ended; see the log".to_owned()),
    }
}

/// SIGHUP: the file is read again and becomes desired state, changes made by command included in what it replaces.
async fn reread_on(mut hang_up: Signal, control: ControlHandle, file: Option<PathBuf>) {
    while hang_up.recv().await.is_some() {
        let Some(file) = file.clone() else {
            tracing::warn!("SIGHUP: there is no configuration file to read again (--config)");
            continue;
        };
        let reread = control.call(move |control| {
            let applied = reread(control, &file);
            (file, applied)
        });
        match reread.await {
            Ok((file, Ok(applied))) if applied.changes.is_empty() => {
                tracing::info!(file = %file.display(), "SIGHUP: read again, nothing has changed");
            }
            Ok((file, Ok(applied))) => {
                tracing::info!(file = %file.display(), generation = applied.generation, "SIGHUP: read again and applied");
            }
            Ok((file, Err(error))) => {
                let mistakes = match error {
                    ApplyError::Mistakes(mistakes) => mistakes,
                    ApplyError::Host(mistake) => vec![mistake],
                };
                for mistake in &mistakes {
                    tracing::error!(file = %file.display(), "{mistake}");
                }
                tracing::error!("SIGHUP: nothing was changed");
            }
            Err(gone) => tracing::error!("SIGHUP: {gone}"),
        }
    }
}

fn reread(control: &mut Control, file: &Path) -> Result<control::Applied, ApplyError> {
    let text = load(file).map_err(|mistake| ApplyError::Mistakes(vec![mistake]))?;
    let accepted = if is_json(file) { control.read_json_text(&text) } else { control.read_toml(&text) }?;
    control.apply(accepted, false)
}

/// Whether a file is JSON rather than TOML: by its name.
pub fn is_json(file: &Path) -> bool {
    file.extension().is_some_and(|extension| extension == "json")
}

/// A configuration file's text.
pub fn load(file: &Path) -> Result<String, Mistake> {
    let size = std::fs::metadata(file).map(|metadata| metadata.len());
    match size {
        Ok(bytes) if bytes > config::TEXT_BYTES_MAX as u64 => {
            Err(Mistake::new("", format!("{bytes} bytes; a configuration has at most {}", config::TEXT_BYTES_MAX)))
        }
        _ => std::fs::read_to_string(file).map_err(|error| Mistake::new("", format!("cannot be read: {error}"))),
    }
}

fn read(file: &Path, context: Context<'_>) -> Result<Accepted, Vec<Mistake>> {
    let text = load(file).map_err(|mistake| vec![mistake])?;
    if is_json(file) { config::from_json_text(&text, context) } else { config::from_toml(&text, context) }
}

/// One line for each mistake, as compilers write them: `FILE:LINE: path: message`.
pub fn listing(file: &Path, mistakes: &[Mistake]) -> String {
    let line = |mistake: &Mistake| {
        let line = mistake.line.map(|line| format!("{line}:")).unwrap_or_default();
        let path = if mistake.path.is_empty() { String::new() } else { format!("{}: ", mistake.path) };
        format!("{}:{line} {path}{}", file.display(), mistake.message)
    };
    mistakes.iter().map(line).collect::<Vec<_>>().join("\n")
}
