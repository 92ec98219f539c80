//! CVE-2019-14818, CVE-2022-0669, 218daf1664 in DPDK: no message leaves a descriptor behind. Alone in its binary, for
//! it counts the process's.

mod support;

use support::*;

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").expect("the system has a /proc").count()
}

#[test]
fn a_thousand_front_ends_with_surplus_descriptors_leave_none_behind() {
    let port = Port::server();
    let event = dreamwire_vhost::eventfd::EventFd::new().unwrap();
    // One whole session first: whatever is opened once and kept, is.
    drop(port.session());
    port.owner.await_disconnect(1);
    let before = open_descriptors();
    for round in 0..1000 {
        let mut front_end = FrontEnd::connect(&port.socket);
        front_end.tell(SET_VRING_CALL, &0u64.to_ne_bytes(), &[raw(&event)]);
        let (request, surplus) =
            [(GET_FEATURES, 1), (SET_VRING_KICK, 8), (SET_MEM_TABLE, 33), (SET_OWNER, 200)][round % 4];
        front_end.tell(request, &[], &vec![raw(&event); surplus]);
        drop(front_end);
    }
    port.owner.await_disconnect(1001);
    eventually("as many descriptors as before", || open_descriptors() <= before);
}
