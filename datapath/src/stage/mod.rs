//! The stages of the pipeline. Each is one file and loops over the frames of a burst; the worker's turn calls them in order. What two
//! of them need is beside them, or the one's answer about a single frame: where it goes (`switch::decide`), whether a copy may come in
//! (`admit::Flooded`).

pub(crate) mod accept;
pub(crate) mod admit;
pub(crate) mod decap;
mod flood;
pub(crate) mod meter;
pub(crate) mod parse;
pub(crate) mod police;
pub(crate) mod recall;
pub(crate) mod receive;
pub(crate) mod switch;
pub(crate) mod transmit;
