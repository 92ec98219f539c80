//! Two ends of a wire in memory, for tests of rounds: what one sends the other receives, unless the wire is told to do harm.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use super::end::End;
use super::sink::Sink;
use crate::front_end::{BURST, FrontEndError, Received, VirtioNetHeader};

/// What happens to a frame, by how many were sent before it: the frames that come out.
pub(super) type Harm = fn(u64, Vec<u8>) -> Vec<Vec<u8>>;

/// One end. Limits: as many frames under way as memory holds.
#[derive(Debug)]
pub(super) struct Loopback {
    out: Rc<RefCell<VecDeque<Vec<u8>>>>,
    into: Rc<RefCell<VecDeque<Vec<u8>>>>,
    harm: Harm,
    templates: Vec<Vec<u8>>,
    next_template: usize,
    sent: u64,
}

/// Both ends; `harm` is done on the way from the first to the second.
pub(super) fn pair(harm: Harm) -> [Loopback; 2] {
    let queues: [Rc<RefCell<VecDeque<_>>>; 2] = Default::default();
    let end = |out: usize, harm: Harm| Loopback {
        out: Rc::clone(&queues[out]),
        into: Rc::clone(&queues[1 - out]),
        harm,
        templates: Vec::new(),
        next_template: 0,
        sent: 0,
    };
    [end(0, harm), end(1, |_, frame| vec![frame])]
}

impl End for Loopback {
    fn load(&mut self, frames: &[Vec<u8>], _header: VirtioNetHeader) -> Result<(), FrontEndError> {
        (self.templates, self.next_template) = (frames.to_vec(), 0);
        Ok(())
    }

    fn repost(&mut self, most: u16) -> Result<u16, FrontEndError> {
        for _ in 0..most {
            let frame = self.templates[self.next_template].clone();
            self.next_template = (self.next_template + 1) % self.templates.len();
            self.send(&frame)?;
        }
        Ok(most)
    }

    fn next_template(&self) -> usize {
        self.next_template
    }

    fn skip_to(&mut self, index: usize) {
        self.next_template = index;
    }

    fn sent(&self) -> u64 {
        self.sent
    }

    fn send(&mut self, frame: &[u8]) -> Result<(), FrontEndError> {
        self.out.borrow_mut().extend((self.harm)(self.sent, frame.to_vec()));
        self.sent += 1;
        Ok(())
    }

    fn receive_into(&mut self, sink: &mut Sink<'_>) -> Result<usize, FrontEndError> {
        self.receive_each(&mut |frame| {
            sink.take(frame);
        })
    }

    fn receive_each(&mut self, each: &mut dyn FnMut(Received<'_>)) -> Result<usize, FrontEndError> {
        let mut into = self.into.borrow_mut();
        let count = into.len().min(usize::from(BURST));
        for mut frame in into.drain(..count) {
            each(Received::private(&mut frame, VirtioNetHeader::default()));
        }
        Ok(count)
    }

    fn frames_held(&self, _bytes: usize) -> u16 {
        u16::MAX
    }
}
