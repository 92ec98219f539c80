//! Numbers from rounds: medians, spreads, ratios; as a table for people and as JSON for scripts.

pub mod paired;
pub mod series;
pub mod table;

pub use paired::Paired;
pub use series::{Series, Summary};
pub use table::Table;
