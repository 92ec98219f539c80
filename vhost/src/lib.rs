//! vhost-user sessions and virtqueues: guest memory, never packet formats.

pub mod eventfd;
pub mod frame;
pub mod memory;
pub mod owner;
pub mod ring;
