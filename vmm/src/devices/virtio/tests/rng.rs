//! Random numbers into the guest.

use super::driver::*;
use crate::devices::io_thread::Turn;
use crate::devices::virtio::device::Work;
use crate::devices::virtio::rng::Rng;

#[test]
fn requests_are_filled_up_to_a_limit() {
    let mut driver = Driver::new(Rng::new());
    driver.start_with_all();
    driver.add(0, &[(BUFFERS, 16, true), (BORDER as u64 - 8, 5000, true)]);
    driver.add(0, &[(BUFFERS + 0x1000, 100_000, true)]);
    driver.add(0, &[(BUFFERS, 16, false)]);
    driver.work_off(Work::Queue(0));
    assert_eq!(driver.used(0), [(0, 5016), (2, 65_536), (3, 0)]);
    assert_ne!(driver.get(BUFFERS, 16), [0; 16]);
    assert_ne!(driver.get(BORDER as u64 + 4900, 16), [0; 16]);
    assert_ne!(driver.get(BUFFERS + 0x1000 + 65_520, 16), [0; 16]);
    assert_eq!(driver.get(BUFFERS + 0x1000 + 65_536, 16), [0; 16], "no further than the limit");
    assert_eq!(driver.take_interrupt(), 1);
}

#[test]
fn many_requests_take_several_turns() {
    let mut driver = Driver::new(Rng::new());
    driver.start(0);
    for _ in 0..10 {
        driver.add(0, &[(BUFFERS, 16, true)]);
    }
    assert_eq!(driver.work(Work::Queue(0)), Turn::More);
    assert_eq!(driver.used(0).len(), 4);
    driver.work_off(Work::Continue);
    assert_eq!(driver.used(0).len(), 6);
}
