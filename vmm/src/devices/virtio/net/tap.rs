//! TAP interfaces of the current network namespace: opened or created, plugged into a bridge, brought up.
//!
//! A TAP has an Ethernet address of its own and says nothing by itself (on a bridge, its IPv6 is switched off), so it can be
//! plugged in on the host that a machine will move to while the machine still runs elsewhere: the bridge learns the guest's
//! address only from the first frame that the guest, or the VMM in its name, sends.
#![allow(unsafe_code)] // Network interfaces are set up with ioctl(2), which has no safe wrapper for `ifreq`.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};
use tracing::{debug, warn};

use super::{Backend, HEADER_BYTES};

const TUN_DEVICE: &str = "/dev/net/tun";
/// Not in libc for this target: linux/sockios.h.
const SIOCBRADDIF: libc::Ioctl = 0x89a2;
const SIOCBRDELIF: libc::Ioctl = 0x89a3;
/// The kernel fills in the first free number.
const NAME_PATTERN: &str = "mvm%d";
/// How the address of a TAP on a bridge begins.
const RANK: [u8; 3] = [0xfe, 0xff, 0xff];
/// `IFNAMSIZ` less the terminating zero.
const MAX_NAME_BYTES: usize = libc::IFNAMSIZ - 1;

/// A TAP cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// No such name can exist.
    #[error(
        "`{0}` is no name for a network interface (1 to {MAX_NAME_BYTES} characters, no slashes, colons, percent signs or spaces)"
    )]
    Name(String),
    /// The kernel has no TUN/TAP driver, or the device node is not here.
    #[error(
        "{TUN_DEVICE} is not there: load the kernel's `tun` module (modprobe tun), or make the device visible in this container"
    )]
    NoDriver(#[source] io::Error),
    /// Not allowed.
    #[error(
        "no permission for TAP {0}: creating one needs CAP_NET_ADMIN; run as root, or have root make one for this user with: \
         ip tuntap add {0} mode tap user $USER && ip link set {0} up; then: --net tap={0}"
    )]
    Permission(String, #[source] io::Error),
    /// Somebody has it open.
    #[error("TAP {0} is in use by another process")]
    Busy(String),
    /// There is an interface of that name, of another kind or with other properties.
    #[error("network interface {0} exists but is not a TAP that can be used (made with: ip tuntap add {0} mode tap)")]
    NotATap(String),
    /// No bridge of that name.
    #[error("bridge {0} does not exist; create it with: ip link add {0} type bridge && ip link set {0} up")]
    NoBridge(String),
    /// An interface, but no bridge.
    #[error("network interface {0} is not a bridge")]
    NotABridge(String),
    /// The TAP is a port of something else.
    #[error("TAP {tap} is plugged in elsewhere already; take it out with: ip link set {tap} nomaster")]
    PluggedInElsewhere {
        /// The TAP.
        tap: String,
    },
    /// Anything else.
    #[error("{what} TAP {tap} failed")]
    System {
        /// What was tried.
        what: &'static str,
        /// The TAP.
        tap: String,
        /// How it failed.
        #[source]
        source: io::Error,
    },
}

/// An open TAP that is up. One that was created here disappears when its last descriptor is closed (the I/O thread has one,
/// until it stops); one that existed stays, and leaves the bridge that it was plugged into here.
#[derive(Debug)]
pub struct Tap {
    file: File,
    name: String,
    unplug: Option<Unplug>,
}

/// Takes an interface out of a bridge again when it is dropped.
#[derive(Debug)]
pub struct Unplug {
    tap: String,
    bridge: String,
    ipv6_was_on: bool,
}

impl Tap {
    /// Opens the TAP `name`, creates it if there is none, or creates one with a name of the kernel's choice; plugs it into
    /// `bridge`; brings it up. All in the network namespace of the calling thread.
    pub fn open(name: Option<&str>, bridge: Option<&str>) -> Result<Self, TapError> {
        if let Some(name) = name {
            check_name(name)?;
        }
        if let Some(bridge) = bridge {
            check_name(bridge)?;
        }
        let wanted = name.unwrap_or("tap0");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
            .open(TUN_DEVICE)
            .map_err(|error| match error.raw_os_error() {
                Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => TapError::NoDriver(error),
                Some(libc::EACCES | libc::EPERM) => TapError::Permission(wanted.into(), error),
                _ => TapError::System { what: "opening", tap: wanted.into(), source: error },
            })?;
        let mut request = request(name.unwrap_or(NAME_PATTERN));
        request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
        interface_ioctl(&file, libc::TUNSETIFF, &mut request).map_err(|error| match error.raw_os_error() {
            Some(libc::EBUSY) => TapError::Busy(wanted.into()),
            Some(libc::EPERM | libc::EACCES) => TapError::Permission(wanted.into(), error),
            Some(libc::EINVAL) if name.is_some() => TapError::NotATap(wanted.into()),
            _ => TapError::System { what: "attaching to", tap: wanted.into(), source: error },
        })?;
        let mut tap = Self { file, name: name_of(&request), unplug: None };
        let header = HEADER_BYTES as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads an int through the pointer, which is valid during the call.
        check(unsafe { libc::ioctl(tap.file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const header) })
            .map_err(|error| tap.error("setting the header size of", error))?;
        tap.set_offloads(0).map_err(|error| tap.error("setting the offloads of", error))?;
        let control = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
            .map_err(|error| tap.error("setting up", error.into()))?;
        if let Some(bridge) = bridge {
            tap.plug_into(bridge, &control)?;
        }
        tap.bring_up(&control)?;
        Ok(tap)
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The duty to take the TAP out of its bridge, if there is one, for a process that will still be allowed to.
    pub fn take_unplug(&mut self) -> Option<Unplug> {
        self.unplug.take()
    }

    /// The same TAP, for a machine that is built anew where nothing can be opened any more; without offloads, which the new one
    /// has not asked for.
    pub fn try_clone(&self) -> io::Result<Self> {
        let tap = Self { file: self.file.try_clone()?, name: self.name.clone(), unplug: None };
        tap.set_offloads(0)?;
        Ok(tap)
    }

    fn error(&self, what: &'static str, source: io::Error) -> TapError {
        match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => TapError::Permission(self.name.clone(), source),
            _ => TapError::System { what, tap: self.name.clone(), source },
        }
    }

    /// Whether the interface stays when its last descriptor is closed.
    fn is_persistent(&self) -> bool {
        let mut request = request("");
        interface_ioctl(&self.file, libc::TUNGETIFF, &mut request).is_ok_and(|()| {
            // SAFETY: TUNGETIFF has filled in the flags; all members of the union are plain integers and the request was zeroed.
            i32::from(unsafe { request.ifr_ifru.ifru_flags }) & libc::IFF_PERSIST != 0
        })
    }

    fn plug_into(&mut self, bridge: &str, control: &OwnedFd) -> Result<(), TapError> {
        let index = index_of(control, &self.name).map_err(|error| self.error("finding", error))?;
        // Before it is up: the host's end of a port is to say nothing. Without IPv6 there is no such file.
        let ipv6_was_on = fs::read_to_string(ipv6_switch(&self.name)).is_ok_and(|on| on.trim() == "0");
        if ipv6_was_on && let Err(error) = fs::write(ipv6_switch(&self.name), "1") {
            debug!(%error, tap = self.name, "IPv6 cannot be switched off");
        }
        if !self.is_persistent() {
            self.rank_last(control).map_err(|error| self.error("setting the address of", error))?;
        }
        let mut request = request(bridge);
        request.ifr_ifru.ifru_ifindex = index;
        let Err(error) = interface_ioctl(control, SIOCBRADDIF, &mut request) else {
            if self.is_persistent() {
                self.unplug = Some(Unplug { tap: self.name.clone(), bridge: bridge.into(), ipv6_was_on });
            }
            return Ok(());
        };
        if error.raw_os_error() == Some(libc::EBUSY) && is_port_of(&self.name, bridge) {
            return Ok(());
        }
        restore_ipv6(&self.name, ipv6_was_on);
        Err(match error.raw_os_error() {
            Some(libc::ENODEV) => TapError::NoBridge(bridge.into()),
            Some(libc::EOPNOTSUPP | libc::EINVAL) => TapError::NotABridge(bridge.into()),
            Some(libc::EBUSY) => TapError::PluggedInElsewhere { tap: self.name.clone() },
            _ => self.error("plugging in", error),
        })
    }

    /// Gives the TAP an address that is above any other port's. A bridge without an address of its own takes its ports' lowest: it
    /// would change with each machine that comes or goes, and cut the host off from neighbours that know the old one. Of the
    /// kernel's random addresses one in 64 begins with fe, so the next two bytes count as well; the last three stay random.
    fn rank_last(&self, control: &OwnedFd) -> io::Result<()> {
        let mut request = request(&self.name);
        interface_ioctl(control, libc::SIOCGIFHWADDR, &mut request)?;
        // SAFETY: SIOCGIFHWADDR has filled in the address; all members of the union are plain integers.
        let mut address = unsafe { request.ifr_ifru.ifru_hwaddr };
        address.sa_data[..3].copy_from_slice(&RANK.map(u8::cast_signed));
        request.ifr_ifru.ifru_hwaddr = address;
        interface_ioctl(control, libc::SIOCSIFHWADDR, &mut request)
    }

    /// A TAP that root has prepared and brought up for a user needs no privilege here.
    fn bring_up(&self, control: &OwnedFd) -> Result<(), TapError> {
        let mut request = request(&self.name);
        interface_ioctl(control, libc::SIOCGIFFLAGS, &mut request).map_err(|error| self.error("looking at", error))?;
        // SAFETY: SIOCGIFFLAGS has filled in the flags; all members of the union are plain integers and the request was zeroed.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        if i32::from(flags) & libc::IFF_UP != 0 {
            return Ok(());
        }
        request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
        interface_ioctl(control, libc::SIOCSIFFLAGS, &mut request).map_err(|error| self.error("bringing up", error))
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Backend for Tap {
    fn name(&self) -> &str {
        &self.name
    }

    fn set_offloads(&self, offloads: u32) -> io::Result<()> {
        // SAFETY: TUNSETOFFLOAD takes a plain number.
        check(unsafe { libc::ioctl(self.file.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offloads)) })
    }
}

impl Drop for Unplug {
    fn drop(&mut self) {
        let Self { tap, bridge, ipv6_was_on } = self;
        let unplugged = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
            .map_err(io::Error::from)
            .and_then(|control| {
                let mut request = request(bridge);
                request.ifr_ifru.ifru_ifindex = index_of(&control, tap)?;
                interface_ioctl(&control, SIOCBRDELIF, &mut request)
            });
        if let Err(error) = unplugged {
            warn!(%error, "TAP {tap} could not be taken out of bridge {bridge}");
        }
        restore_ipv6(tap, *ipv6_was_on);
    }
}

fn check_name(name: &str) -> Result<(), TapError> {
    let good = (1..=MAX_NAME_BYTES).contains(&name.len())
        && name != "."
        && name != ".."
        && name.bytes().all(|c| c.is_ascii_graphic() && !b"/:%".contains(&c));
    if good { Ok(()) } else { Err(TapError::Name(name.into())) }
}

fn ipv6_switch(interface: &str) -> String {
    format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6")
}

fn restore_ipv6(interface: &str, was_on: bool) {
    if was_on && let Err(error) = fs::write(ipv6_switch(interface), "0") {
        debug!(%error, interface, "IPv6 cannot be switched on again");
    }
}

fn is_port_of(tap: &str, bridge: &str) -> bool {
    fs::read_link(format!("/sys/class/net/{tap}/brport/bridge"))
        .is_ok_and(|target| target.file_name().is_some_and(|name| name == bridge))
}

/// A request about the interface `name`, at most [`MAX_NAME_BYTES`] long, with everything else zero.
fn request(name: &str) -> libc::ifreq {
    // SAFETY: an `ifreq` is made of integers, arrays of integers and unions of such, for all of which zero is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()).take(MAX_NAME_BYTES) {
        *to = from as libc::c_char;
    }
    request
}

fn name_of(request: &libc::ifreq) -> String {
    request.ifr_name.iter().take_while(|c| **c != 0).map(|c| char::from(*c as u8)).collect()
}

fn index_of(control: &OwnedFd, name: &str) -> io::Result<i32> {
    let mut request = request(name);
    interface_ioctl(control, libc::SIOCGIFINDEX, &mut request)?;
    // SAFETY: SIOCGIFINDEX has filled in the index; all members of the union are plain integers and the request was zeroed.
    Ok(unsafe { request.ifr_ifru.ifru_ifindex })
}

/// An ioctl that takes an `ifreq` and nothing else.
fn interface_ioctl(fd: &impl AsRawFd, code: libc::Ioctl, request: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: all callers give a code whose argument is an `ifreq`, which is valid and exclusively ours during the call.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), code, std::ptr::from_mut(request)) })
}

fn check(returned: libc::c_int) -> io::Result<()> {
    if returned < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_no_interface_can_have_are_refused_before_anything_is_opened() {
        for name in ["", ".", "..", "a/b", "a:1", "mvm%d", "a b", "sixteen-bytes-xx", "gar\u{e7}on", "a\0b", "tab\t"] {
            let error = Tap::open(Some(name), None).unwrap_err();
            assert!(matches!(error, TapError::Name(_)), "{name:?}: {error}");
            let error = Tap::open(None, Some(name)).unwrap_err();
            assert!(matches!(error, TapError::Name(_)), "bridge {name:?}: {error}");
        }
        check_name("fifteen-bytes-x").unwrap();
    }

    #[test]
    fn errors_say_what_to_do() {
        let text = TapError::NoBridge("br0".into()).to_string();
        assert!(text.contains("ip link add br0 type bridge && ip link set br0 up"), "{text}");
        assert_eq!(TapError::Busy("tap0".into()).to_string(), "TAP tap0 is in use by another process");
        let text = TapError::Permission("tap0".into(), io::ErrorKind::PermissionDenied.into()).to_string();
        assert!(text.contains("CAP_NET_ADMIN") && text.contains("ip tuntap add tap0"), "{text}");
    }
}
