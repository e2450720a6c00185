//! How many connections are served at once: so many altogether, and of them only a share for one address, so that one stranger
//! cannot keep everybody else out.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Connections served at once; each is a thread. A connection is served for a moment: until a question is answered, or a socket
/// handed over.
pub const MAX_CONNECTIONS: usize = 256;
/// Of one address. A migration with the most page streams has 18.
pub const MAX_OF_ONE: usize = 64;

/// Counts the connections that are being served.
#[derive(Debug, Default)]
pub struct Gate(Mutex<HashMap<IpAddr, usize>>);

/// A place at the gate, given back when it is dropped.
#[derive(Debug)]
pub struct Place {
    gate: Arc<Gate>,
    whose: IpAddr,
}

/// Whoever has one IPv6 address has its network of 64 bits.
fn share(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6((u128::from(v6) >> 64 << 64).into()),
        v4 => v4,
    }
}

impl Gate {
    /// A place for a connection from `address`, or why there is none.
    pub fn enter(self: &Arc<Self>, address: IpAddr) -> Result<Place, &'static str> {
        let whose = share(address);
        let mut places = self.lock();
        if places.values().sum::<usize>() >= MAX_CONNECTIONS {
            return Err("too many connections");
        }
        let of_one = places.entry(whose).or_default();
        if *of_one >= MAX_OF_ONE {
            return Err("too many connections from this address");
        }
        *of_one += 1;
        Ok(Place { gate: self.clone(), whose })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<IpAddr, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut places = self.gate.lock();
        if let Some(of_one) = places.get_mut(&self.whose) {
            *of_one -= 1;
            if *of_one == 0 {
                places.remove(&self.whose);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_takes_all_places_and_every_place_is_given_back() {
        let gate = Arc::new(Gate::default());
        let stranger: IpAddr = "fd00::1".parse().unwrap();
        let mut places: Vec<Place> = (0..MAX_OF_ONE).map(|_| gate.enter(stranger).unwrap()).collect();
        assert!(gate.enter("fd00::2".parse().unwrap()).is_err(), "the same network");
        let other: IpAddr = "10.0.0.1".parse().unwrap();
        let mapped = "::ffff:10.0.0.1".parse().unwrap();
        drop((gate.enter(other).unwrap(), gate.enter(mapped).unwrap()));
        places.pop();
        places.push(gate.enter(stranger).unwrap());
        for n in 0.. {
            match gate.enter(IpAddr::from([10, 1, 0, n])) {
                Ok(place) => places.push(place),
                Err(_) => break,
            }
        }
        assert_eq!(places.len(), MAX_CONNECTIONS);
        places.clear();
        assert!(gate.lock().is_empty());
    }
}
