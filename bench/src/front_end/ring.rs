//! A ring of either layout: the verbs of split.rs and packed.rs, chosen by what was negotiated. Inlined, so that the choice
//! is a predicted branch and no call.

use std::sync::Arc;

use super::header::feature;
use super::layout::{Descriptor, RingLayout};
use super::memory::{Arena, GuestMemory};
use super::options::Options;
use super::packed::PackedRing;
use super::split::SplitRing;

/// One virtqueue, driven by us.
#[derive(Debug)]
pub enum Ring {
    /// VIRTIO 1.2 §2.7.
    Split(SplitRing),
    /// VIRTIO 1.2 §2.8, with RING_PACKED.
    Packed(PackedRing),
}

/// Does the same with whichever layout it is.
macro_rules! either {
    ($ring:expr, $it:ident => $do:expr) => {
        match $ring {
            $crate::front_end::ring::Ring::Split($it) => $do,
            $crate::front_end::ring::Ring::Packed($it) => $do,
        }
    };
}
pub(super) use either;

impl Ring {
    /// The ring of `options` in `arena`; `None` when memory is short.
    ///
    /// # Panics
    /// If its size is none that the layout can have.
    pub fn place(memory: &Arc<GuestMemory>, arena: &mut Arena, options: &Options, features: u64) -> Option<Self> {
        let (size, base) = (options.ring_size, options.ring_base);
        let event_idx = features & feature::EVENT_IDX != 0;
        Some(if features & feature::RING_PACKED != 0 {
            let layout = RingLayout::place_packed(arena, size)?;
            let in_order = features & feature::IN_ORDER != 0;
            Self::Packed(PackedRing::new(memory.clone(), layout, event_idx, in_order, base))
        } else {
            let layout = RingLayout::place(arena, size)?;
            Self::Split(SplitRing::new(memory.clone(), layout, event_idx, base).rewrite(options.rewrite))
        })
    }

    /// Whether it is a packed one.
    pub fn is_packed(&self) -> bool {
        matches!(self, Self::Packed(_))
    }

    /// Where its parts lie.
    #[inline(always)]
    pub fn layout(&self) -> RingLayout {
        either!(self, ring => ring.layout())
    }

    /// The memory that it lies in.
    #[inline(always)]
    pub fn memory(&self) -> &Arc<GuestMemory> {
        either!(self, ring => ring.memory())
    }

    /// Chains offered and not yet reaped.
    pub fn outstanding(&self) -> u16 {
        either!(self, ring => ring.outstanding())
    }

    /// Sets a descriptor of a chain that is not outstanding.
    #[inline(always)]
    pub fn set_descriptor(&mut self, index: u16, descriptor: Descriptor) {
        either!(self, ring => ring.set_descriptor(index, descriptor));
    }

    /// Enters the chain at `head`; invisible to the device until [`Self::publish`].
    #[inline(always)]
    pub fn offer(&mut self, head: u16) {
        either!(self, ring => ring.offer(head));
    }

    /// Makes all offered chains visible. True if the device has to be kicked for them.
    #[inline(always)]
    pub fn publish(&mut self) -> bool {
        either!(self, ring => ring.publish())
    }

    /// The driver polls: no calls, please.
    pub fn suppress_calls(&mut self) {
        either!(self, ring => ring.suppress_calls());
    }

    /// Asks for a call at the next used chain; false if there is one already: reap again before sleeping.
    pub fn enable_calls(&mut self) -> bool {
        either!(self, ring => ring.enable_calls())
    }
}
