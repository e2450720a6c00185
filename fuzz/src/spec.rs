//! What a VM is asked to be, as it comes in offers, files and on command lines: refused, or the same again when it is written and
//! read once more.

use std::fmt::{Debug, Display};
use std::str::FromStr;

use migrator::traits::VmDescription;
use serde::Serialize;
use serde::de::DeserializeOwned;
use vmm::devices::virtio::MacAddress;

#[allow(dead_code, unused_qualifications)] // The program is no library; this is all that it needs of `vmm` and `images`.
#[path = "../../src/machine/spec.rs"]
mod machine;

use machine::{Cidr, MachineSpec, NetSpec};

pub fn run(data: &[u8]) {
    let Some((mode, data)) = data.split_first() else { return };
    if let (0, Ok(spec)) = (mode % 5, serde_json::from_slice::<MachineSpec>(data)) {
        again(&spec);
        let line = spec.boot_cmdline();
        assert!(line.contains(spec.boot.cmdline.trim_start()));
        if spec.vm_config().validate().is_ok() {
            assert!((1..=64).contains(&spec.cpus) && spec.nets.len() < 8 && spec.memory_bytes <= 512 << 30);
        }
    }
    if let (1, Ok(description)) = (mode % 5, serde_json::from_slice::<VmDescription>(data)) {
        again(&description);
    }
    let Ok(text) = std::str::from_utf8(data) else { return };
    match mode % 5 {
        2 => drop(NetSpec::parse(text, "web", 0).map(|net| again(&net))),
        3 => word::<Cidr>(text),
        4 => word::<MacAddress>(text),
        _ => {}
    }
}

fn again<T: Serialize + DeserializeOwned + PartialEq + Debug>(value: &T) {
    let text = serde_json::to_string(value).unwrap();
    assert_eq!(serde_json::from_str::<T>(&text).unwrap(), *value);
}

fn word<T: FromStr<Err: Debug> + Display + PartialEq + Debug>(text: &str) {
    if let Ok(value) = text.parse::<T>() {
        assert_eq!(value.to_string().parse::<T>().unwrap(), value);
    }
}
