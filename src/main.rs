//! The `dreamwire` program; everything is in the library.
#![deny(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    dreamwire::cli::main()
}
