//! `microvm trust`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

/// What `trust` does.
#[derive(Debug, Subcommand)]
pub enum TrustCommand {
    /// Make a fleet: its CA, and this host's certificate
    Init {
        /// The fleet's name (default: this host's)
        #[arg(long, value_name = "FLEET")]
        name: Option<String>,
        /// This host's name (default: what `hostname` says)
        #[arg(long, value_name = "HOST")]
        host: Option<String>,
        /// Names and days.
        #[command(flatten)]
        names: TrustNames,
    },
    /// Certify another host: print what it must import
    ///
    /// Without --address, the addresses that HOST resolves to here are taken. There is a key in what is printed: it goes
    /// through ssh, or into a file that only its owner reads.
    Issue {
        /// Its name
        host: String,
        /// Names and days.
        #[command(flatten)]
        names: TrustNames,
        /// Write it to a new file; -: to standard output, whatever that is
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
    /// Join a fleet, or learn what is new in it: check what `issue` or `export` printed, and install it
    Import {
        /// The file; -: standard input
        file: PathBuf,
    },
    /// Show the fleet, this host's names, fingerprints and expiry
    Show {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Print what every host of the fleet may know: CAs and revocations, no key
    Export {
        /// Write it to a new file; -: to standard output
        #[arg(long, value_name = "FILE")]
        out: Option<PathBuf>,
    },
    /// Renew this host's certificate, or the fleet's CA (on the CA's host)
    Rotate {
        /// Make a new CA; the old one stays trusted until --finish
        #[arg(long)]
        ca: bool,
        /// Drop the old CA
        #[arg(long, conflicts_with = "ca")]
        finish: bool,
        /// Names and days.
        #[command(flatten)]
        names: TrustNames,
    },
    /// Trust none of a host's certificates any more (on the CA's host; `export` tells the others)
    Revoke {
        /// The host
        host: String,
    },
}

/// Names and days of a certificate.
#[derive(Debug, Args)]
pub struct TrustNames {
    /// Another name or address by which the host is dialled; may be given several times
    #[arg(long = "address", value_name = "ADDR")]
    pub addresses: Vec<String>,
    /// Days until the certificate expires
    #[arg(long, value_name = "N", default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=3650))]
    pub days: u32,
}
