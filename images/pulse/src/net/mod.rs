//! The network: smoltcp on the card, and the services on smoltcp.
//!
//! A turn handles a few frames at most, so that traffic makes no hole in the guest's own time. When the guest sleeps, the
//! card's interrupt wakes it; where there is none, its tick does.

mod device;
mod services;

use crate::platform::apic;
use crate::platform::interrupts;
use crate::platform::memory::Memory;
use core::fmt;
use core::net::Ipv6Addr;
use device::Nic;
use pulse_core::acpi::IoApic;
use pulse_core::cmdline::Settings;
use pulse_core::discovery::{Devices, MmioDevice};
use pulse_core::http::{Command, Guest};
pub use services::SOCKETS;
use services::Services;
use smoltcp::iface::{Config, Interface, PollIngressSingleResult, SocketSet, SocketStorage};
use smoltcp::time::Instant;
use smoltcp::wire::{EthernetAddress, IpCidr, Ipv4Cidr, Ipv6Cidr};

const MOST_FRAMES_A_TURN: usize = 4;

/// The running network.
pub struct Net<'s> {
    nic: Nic,
    interface: Interface,
    sockets: SocketSet<'s>,
    services: Services,
    /// When smoltcp wants its next turn.
    next_ns: u64,
    /// Where the card was found.
    pub device: MmioDevice,
    /// Whether its interrupt wakes the guest.
    pub has_interrupt: bool,
}

/// A hardware address, shown as most tools do.
pub struct Mac([u8; 6]);

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// Room for the sockets.
pub type Storage<'s> = [SocketStorage<'s>; SOCKETS];

impl<'s> Net<'s> {
    /// Brings up the first card of `devices`. `None` without an address, a card, or memory.
    pub fn start(
        settings: &Settings,
        devices: &Devices,
        io_apics: &[Option<IoApic>],
        memory: &mut Memory,
        storage: &'s mut Storage<'s>,
        now_ns: u64,
    ) -> Option<Self> {
        if settings.ip.is_none() && settings.ip6.is_none() {
            return None;
        }
        let (device, mut nic) =
            devices.as_slice().iter().find_map(|device| Some((*device, Nic::start(device, memory)?)))?;
        let mut sockets = SocketSet::new(storage.as_mut_slice());
        let services = Services::open(&mut sockets, memory)?;
        let interface = configure(settings, &mut nic, now_ns);
        let has_interrupt = apic::route_device(io_apics, device.irq);
        Some(Self { nic, interface, sockets, services, next_ns: 0, device, has_interrupt })
    }

    /// The card's address.
    pub fn mac(&self) -> Mac {
        Mac(self.nic.mac())
    }

    /// A turn. Returns whether there was anything to do, and what a request wants done.
    pub fn poll(&mut self, now_ns: u64, guest: &mut dyn Guest) -> (bool, Option<Command>) {
        if interrupts::take_device_interrupt() {
            self.nic.acknowledge();
        }
        if now_ns < self.next_ns && !self.nic.has_frame() {
            return (false, None);
        }
        let now = instant(now_ns);
        for _ in 0..MOST_FRAMES_A_TURN {
            match self.interface.poll_ingress_single(now, &mut self.nic, &mut self.sockets) {
                PollIngressSingleResult::None => break,
                PollIngressSingleResult::PacketProcessed | PollIngressSingleResult::SocketStateChanged => {}
            }
        }
        let command = self.services.poll(now, &mut self.sockets, guest);
        self.interface.poll_egress(now, &mut self.nic, &mut self.sockets);
        self.services.rearm(&mut self.sockets);
        self.next_ns = match self.interface.poll_at(now, &self.sockets) {
            Some(at) => (at.total_micros().max(0) as u64).saturating_mul(1000),
            None => u64::MAX,
        };
        (true, command)
    }

    /// When the next turn is due without a frame coming.
    pub fn next_ns(&self) -> u64 {
        self.next_ns
    }
}

fn configure(settings: &Settings, nic: &mut Nic, now_ns: u64) -> Interface {
    let mac = nic.mac();
    let mut config = Config::new(EthernetAddress(mac).into());
    config.random_seed = settings.seed ^ now_ns;
    let mut interface = Interface::new(config, nic, instant(now_ns));
    interface.update_ip_addrs(|addresses| {
        // There is room for all three: smoltcp is built for four.
        if let Some((address, prefix)) = settings.ip {
            let _ = addresses.push(IpCidr::Ipv4(Ipv4Cidr::new(address, prefix)));
        }
        if let Some((address, prefix)) = settings.ip6 {
            let _ = addresses.push(IpCidr::Ipv6(Ipv6Cidr::new(address, prefix)));
            let _ = addresses.push(IpCidr::Ipv6(Ipv6Cidr::new(link_local(mac), 64)));
        }
    });
    if let Some(gateway) = settings.gateway {
        // There is room: it is the first route.
        let _ = interface.routes_mut().add_default_ipv4_route(gateway);
    }
    interface
}

/// The address that IPv6 wants on every link (RFC 4291, appendix A).
fn link_local(mac: [u8; 6]) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac.map(u16::from);
    Ipv6Addr::new(0xfe80, 0, 0, 0, (a ^ 2) << 8 | b, c << 8 | 0xff, 0xfe00 | d, e << 8 | f)
}

fn instant(ns: u64) -> Instant {
    Instant::from_micros((ns / 1000) as i64)
}
