//! One end of a path under test, as generator and sink see it: a guest's front-end, or a tap of the kernel's.
//!
//! Dynamic, but once per burst and not per frame: the sinks are inside of the implementations' loops.

use std::fmt::Debug;

use super::sink::Sink;
use crate::front_end::{FrontEnd, FrontEndError, Received, VirtioNetHeader};

/// Sends and receives frames, in bursts of at most [`crate::front_end::BURST`].
pub trait End: Debug {
    /// Keeps frames for [`Self::repost`], each with `header`; replaces those before. Only while nothing is in flight.
    ///
    /// # Errors
    /// No room for them.
    fn load(&mut self, frames: &[Vec<u8>], header: VirtioNetHeader) -> Result<(), FrontEndError>;

    /// Sends the next up to `most` of the frames that were loaded, going round for ever; returns how many went in.
    ///
    /// # Errors
    /// The other side broke the rules.
    fn repost(&mut self, most: u16) -> Result<u16, FrontEndError>;

    /// Index of the frame that [`Self::repost`] sends next.
    fn next_template(&self) -> usize;

    /// Has [`Self::repost`] go on with that frame.
    fn skip_to(&mut self, index: usize);

    /// Frames sent since the start by [`Self::repost`] and [`Self::send`].
    fn sent(&self) -> u64;

    /// Frames sent that the other side has not finished with, as of the last sending or [`Self::reap`]: none where
    /// sending copies.
    fn in_flight(&self) -> u16 {
        0
    }

    /// Takes back what the other side has finished with.
    ///
    /// # Errors
    /// As [`Self::repost`].
    fn reap(&mut self) -> Result<(), FrontEndError> {
        Ok(())
    }

    /// Sends one frame, with an empty virtio-net header; it is lost if there is no room.
    ///
    /// # Errors
    /// As [`Self::repost`].
    fn send(&mut self, frame: &[u8]) -> Result<(), FrontEndError>;

    /// Hands what has arrived to a checking sink; returns how many.
    ///
    /// # Errors
    /// As [`Self::repost`].
    fn receive_into(&mut self, sink: &mut Sink<'_>) -> Result<usize, FrontEndError>;

    /// As [`Self::receive_into`], to anybody.
    ///
    /// # Errors
    /// As [`Self::repost`].
    fn receive_each(&mut self, each: &mut dyn FnMut(Received<'_>)) -> Result<usize, FrontEndError>;

    /// How many frames of `bytes` can wait here to be received.
    fn frames_held(&self, bytes: usize) -> u16;
}

/// Its first queue pair.
impl End for FrontEnd {
    fn load(&mut self, frames: &[Vec<u8>], header: VirtioNetHeader) -> Result<(), FrontEndError> {
        self.load_templates(0, frames, header)
    }

    fn repost(&mut self, most: u16) -> Result<u16, FrontEndError> {
        Ok(self.pairs()[0].transmit.repost_burst(most)?)
    }

    fn next_template(&self) -> usize {
        self.first().transmit.next_template()
    }

    fn skip_to(&mut self, index: usize) {
        self.pairs()[0].transmit.skip_to(index);
    }

    fn sent(&self) -> u64 {
        self.first().transmit.sent()
    }

    fn in_flight(&self) -> u16 {
        self.first().transmit.in_flight()
    }

    fn reap(&mut self) -> Result<(), FrontEndError> {
        self.pairs()[0].transmit.reap()?;
        Ok(())
    }

    fn send(&mut self, frame: &[u8]) -> Result<(), FrontEndError> {
        self.send_burst(&[frame]).map(drop)
    }

    fn receive_into(&mut self, sink: &mut Sink<'_>) -> Result<usize, FrontEndError> {
        Ok(self.pairs()[0].receive.receive_views(sink)?)
    }

    fn receive_each(&mut self, each: &mut dyn FnMut(Received<'_>)) -> Result<usize, FrontEndError> {
        Ok(self.pairs()[0].receive.receive_views(&mut |frame: Received<'_>| each(frame))?)
    }

    fn frames_held(&self, bytes: usize) -> u16 {
        self.first().receive.frames_held(bytes)
    }
}
