//! Two hosts on a veth pair, each in a network namespace of its own, whose underlays one thread may then serve.

use std::net::IpAddr;
use std::process::Command;
use std::sync::Barrier;
use std::sync::mpsc::channel;

use dreamwire_datapath::mac::Mac;
use nix::sched::{CloneFlags, unshare};
use nix::unistd::gettid;

/// The device in both namespaces.
pub(crate) const DEVICE: &str = "wire";
pub(crate) const MACS: [Mac; 2] = [Mac([2, 0, 0, 0, 0xee, 1]), Mac([2, 0, 0, 0, 0xee, 2])];

pub(crate) fn addresses() -> [IpAddr; 2] {
    ["192.0.2.1", "192.0.2.2"].map(|text| text.parse().expect("an address"))
}

fn ip(words: &str) {
    let status = Command::new("ip").args(words.split(' ')).status().expect("iproute2");
    assert!(status.success(), "ip {words}");
}

/// What `open` makes of each host, on a thread inside its namespace; the sockets in it keep the namespace alive. Needs root.
pub(crate) fn hosts<T: Send>(open: impl Fn(usize) -> T + Sync) -> [T; 2] {
    let (linked, open) = (&Barrier::new(2), &open);
    let (tell, other) = channel();
    let up = &|host: usize| {
        ip(&format!("addr add {}/24 dev {DEVICE}", addresses()[host]));
        ip(&format!("link set {DEVICE} mtu 1600 up"));
    };
    std::thread::scope(|scope| {
        let second = scope.spawn(move || {
            unshare(CloneFlags::CLONE_NEWNET).expect("needs CAP_SYS_ADMIN");
            tell.send(gettid()).expect("the first host listens");
            linked.wait();
            up(1);
            linked.wait();
            open(1)
        });
        let first = scope.spawn(move || {
            let other = other.recv().expect("the second host's thread");
            unshare(CloneFlags::CLONE_NEWNET).expect("needs CAP_SYS_ADMIN");
            let [here, there] = MACS;
            ip(&format!("link add {DEVICE} address {here} type veth peer name {DEVICE} address {there} netns {other}"));
            linked.wait();
            up(0);
            linked.wait();
            open(0)
        });
        [first.join().expect("the first host"), second.join().expect("the second host")]
    })
}
