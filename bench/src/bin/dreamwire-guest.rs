//! The agent inside a test guest; `scripts/guest-image` puts it into the initramfs, whose `/init` starts it.

use std::process::ExitCode;

use dreamwire_bench::topology::serve_guest_agent;

fn main() -> ExitCode {
    match serve_guest_agent() {
        Ok(never) => match never {},
        Err(error) => {
            eprintln!("dreamwire-guest: {error}");
            ExitCode::FAILURE
        }
    }
}
