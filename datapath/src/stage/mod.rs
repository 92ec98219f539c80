//! The stages of the pipeline. Each is one file, loops over the frames of a burst and never calls another.

pub(crate) mod accept;
pub(crate) mod admit;
pub(crate) mod decap;
pub(crate) mod parse;
pub(crate) mod police;
pub(crate) mod recall;
pub(crate) mod receive;
pub(crate) mod switch;
pub(crate) mod transmit;
