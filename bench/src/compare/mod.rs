//! Several devices measured in turns, window by window, in one run: on a shared machine only neighbours in time can be
//! compared.
//!
//! Theory of operation. Every [`Lane`] has a device of its own and a front-end at either end of it. All are started and
//! seen to carry frames; then all sleep (SIGSTOP) but the one whose window it is. A round is one window of every lane, every
//! other round in the opposite order. Of each lane the report has the median over its windows, and the median of its
//! ratios to the baseline's window in the same round ([`Comparison`]).
//!
//! ```text
//!  lane      parse "ovs,size=64,encap"      device    start it for its case, pause, resume
//!  kernel    the one of taps, without a process
//!  run       rounds of windows              report    table, JSON       plot   SVG
//!  standard  the set that scripts/bench runs
//! ```

mod device;
mod kernel;
mod lane;
mod plot;
mod report;
mod run;
mod standard;

use nix::errno::Errno;

pub use device::{Site, is_installed};
pub use lane::{Case, Lane, Load, Way};
pub use plot::svg;
pub use report::{Comparison, LaneReport, Outcome};
pub(crate) use run::raise_descriptor_limit;
pub use run::{Schedule, run};
pub use standard::{Standard, standard};

use crate::front_end::FrontEndError;
use crate::topology::TopologyError;
use crate::traffic::Failure;
use crate::traffic::testpmd::TestpmdError;

/// Why a lane has no result.
#[derive(Debug, thiserror::Error)]
pub enum CompareError {
    /// The device has no such function.
    #[error("{device}: {what}")]
    Cannot {
        /// Which device.
        device: String,
        /// What it cannot do.
        what: String,
    },
    /// testpmd did not start.
    #[error(transparent)]
    Testpmd(#[from] TestpmdError),
    /// OVS or the daemon did not start.
    #[error(transparent)]
    Topology(#[from] TopologyError),
    /// A front-end could not be attached, or its ring broke.
    #[error(transparent)]
    FrontEnd(#[from] FrontEndError),
    /// Nothing came through.
    #[error(transparent)]
    Traffic(#[from] Failure),
    /// Stopping or continuing a device failed: it has ended.
    #[error("stopping or continuing a device: {0}")]
    Signal(Errno),
    /// What came out was wrong.
    #[error("{0}")]
    Content(String),
}
