//! The command line.

mod args;
mod client;
mod command;
mod perimeter_show;
mod rules;
mod table;

use std::process::ExitCode;

use clap::Parser;

use args::{Arguments, Command};

/// Runs the program. Exit status 0: done; 1: not done, the reason is on standard error (for `diff`: there are
/// differences); 2: the command line, or for `diff` the file, is wrong.
pub fn main() -> ExitCode {
    let mut arguments = Arguments::parse();
    // Sockets' paths are shown to other programs, which run elsewhere.
    arguments.run_dir = arguments.run_dir.map(|dir| std::path::absolute(&dir).unwrap_or(dir));
    let result = match arguments.command {
        Command::Run { config, log_level, log_format } => crate::log::init(&log_level, log_format)
            .and_then(|()| crate::run::run(&crate::run::Options { config, run_dir: arguments.run_dir }))
            .map(|()| ExitCode::SUCCESS),
        Command::Diff { file } => {
            return command::diff(&client::Client::new(arguments.run_dir), &file).unwrap_or_else(|error| {
                eprintln!("{error}");
                ExitCode::from(2)
            });
        }
        command => command::execute(&client::Client::new(arguments.run_dir), command).map(|()| ExitCode::SUCCESS),
    };
    result.unwrap_or_else(|error| {
        eprintln!("{error}");
        ExitCode::FAILURE
    })
}
