//! `microvm trust`: the fleet's CA, and what this host has of it.

use std::fs::File;
use std::io::{IsTerminal, Read, Write, stdin, stdout};
use std::net::{IpAddr, ToSocketAddrs};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use time::OffsetDateTime;

use crate::cli::trust::{TrustCommand, TrustNames};
use crate::trust::bundle::{Bundle, MAX_BYTES, unix_now};
use crate::trust::store::{HostTrust, Store, revocations};

/// `show` warns when a certificate ends within so many days.
const WARN_DAYS: i64 = 30;
const DAY: i64 = 86_400;

/// Carries it out.
pub fn run(command: TrustCommand) -> Result<u8> {
    let store = Store::from_env()?;
    match command {
        TrustCommand::Init { name, host, names } => {
            let host = host.map_or_else(this_host, Ok)?;
            let more = or_found(&names, local_addresses)?;
            let made = store.init(&name.unwrap_or_else(|| host.clone()), &host, &more, names.days)?;
            println!("the fleet {} is made, this host is {host}: {}", made.bundle.fleet()?, called(&made));
            println!("another host joins with: microvm trust issue HOST2 | ssh HOST2 microvm trust import -");
        }
        TrustCommand::Issue { host, names, out } => {
            let more = or_found(&names, || resolved(&host))?;
            let bundle = store.issue(&host, &more, names.days)?;
            write_out(&bundle, out.as_deref(), &format!("| ssh {host} microvm trust import -"))?;
            let facts = bundle.host.as_ref().map(|it| crate::trust::bundle::facts(&it.certificate)).transpose()?;
            eprintln!("{host} is certified as {}", facts.map(|facts| facts.names.join(", ")).unwrap_or_default());
        }
        TrustCommand::Export { out } => {
            write_out(&store.export()?, out.as_deref(), "| ssh HOST2 microvm trust import -")?;
        }
        TrustCommand::Import { file } => {
            let bundle =
                Bundle::from_text(&read_in(&file)?).with_context(|| format!("cannot import {}", file.display()))?;
            let here = store.import(bundle)?;
            println!("this host is {} of the fleet {}: {}", here.facts.subject, here.bundle.fleet()?, called(&here));
        }
        TrustCommand::Show { json } => show(&store, json)?,
        TrustCommand::Rotate { ca: true, .. } => {
            store.rotate_authority()?;
            println!(
                "a new CA is made; the old one is trusted until the end. Next, for each other host:\n  \
                 1. microvm trust export | ssh HOST microvm trust import -     (it trusts both)\n  \
                 2. microvm trust issue HOST | ssh HOST microvm trust import - (its certificate is of the new one), \
                 when all hosts have done 1\n  \
                 3. here: microvm trust rotate, then microvm trust rotate --finish, then 1 again for each host"
            );
        }
        TrustCommand::Rotate { finish: true, .. } => {
            store.finish_rotation()?;
            println!(
                "the old CA is dropped here; for each other host: microvm trust export | ssh HOST microvm trust import -"
            );
        }
        TrustCommand::Rotate { names, .. } => {
            let here = store.rotate(&names.addresses, names.days)?;
            println!("renewed until {}: {}", date(here.facts.not_after), called(&here));
        }
        TrustCommand::Revoke { host } => {
            let count = store.revoke(&host)?;
            println!(
                "{count} certificates of {host} are revoked here. Tell the others, each: microvm trust export | ssh HOST microvm trust \
                 import -"
            );
        }
    }
    Ok(0)
}

fn called(host: &HostTrust) -> String {
    format!("it may be dialled as {}", host.facts.names.join(", "))
}

/// This machine's name.
fn this_host() -> Result<String> {
    let name = rustix::system::uname().nodename().to_string_lossy().to_lowercase();
    crate::trust::authority::check_host(&name).context("this machine's name cannot be used: give one with --host")?;
    Ok(name)
}

/// The addresses that were given, or those that can be found.
fn or_found(names: &TrustNames, find: impl FnOnce() -> Result<Vec<IpAddr>>) -> Result<Vec<String>> {
    if names.addresses.is_empty() {
        return Ok(find()?.iter().map(IpAddr::to_string).collect());
    }
    Ok(names.addresses.clone())
}

/// Addresses by which others may reach this machine: not loopback's, nor those of one link only.
fn local_addresses() -> Result<Vec<IpAddr>> {
    let interfaces =
        if_addrs::get_if_addrs().context("this machine's addresses cannot be listed: give them with --address")?;
    let useful = |address: &IpAddr| match address {
        IpAddr::V4(v4) => !v4.is_loopback() && !v4.is_link_local(),
        IpAddr::V6(v6) => !v6.is_loopback() && !v6.is_unicast_link_local(),
    };
    Ok(interfaces.iter().map(if_addrs::Interface::ip).filter(useful).collect())
}

/// The addresses of another host, if its name is known here; it can always be dialled by its name.
fn resolved(host: &str) -> Result<Vec<IpAddr>> {
    let mut found: Vec<IpAddr> =
        (host, 0).to_socket_addrs().into_iter().flatten().map(|address| address.ip()).collect();
    found.retain(|address| !address.is_loopback());
    found.dedup();
    Ok(found)
}

fn write_out(bundle: &Bundle, out: Option<&Path>, pipe: &str) -> Result<()> {
    let text = bundle.to_text();
    match out {
        Some(path) if path != Path::new("-") => {
            // A bundle may hold a key: nobody else reads it, not even for a moment.
            let written = File::options().write(true).create_new(true).mode(0o600).open(path);
            let written = written.and_then(|mut file| file.write_all(text.as_bytes()));
            written.with_context(|| format!("cannot write {}", path.display()))
        }
        None if stdout().is_terminal() && bundle.host.is_some() => {
            bail!("there is a key in it: say where it goes, with {pipe} or --out FILE (--out - prints it)")
        }
        _ => Ok(stdout().write_all(text.as_bytes())?),
    }
}

fn read_in(file: &PathBuf) -> Result<String> {
    let mut text = String::new();
    let from: Box<dyn Read> = match file.as_os_str() == "-" {
        true => Box::new(stdin()),
        false => Box::new(File::open(file).with_context(|| format!("cannot read {}", file.display()))?),
    };
    from.take(MAX_BYTES + 1).read_to_string(&mut text).with_context(|| format!("cannot read {}", file.display()))?;
    ensure!(text.len() as u64 <= MAX_BYTES, "{} is too large to be a bundle", file.display());
    ensure!(!text.trim().is_empty(), "nothing came: the command that makes the bundle has failed");
    Ok(text)
}

fn show(store: &Store, json: bool) -> Result<()> {
    let here = store.open_set_up()?;
    let (fleet, issued) = (here.bundle.fleet()?, store.issued()?);
    let roots = here.bundle.roots.iter().map(|root| crate::trust::bundle::facts(root)).collect::<Result<Vec<_>>>()?;
    let revoked: Vec<String> = revocations(&here.bundle.revoked)?.into_iter().flat_map(|list| list.serials).collect();
    if json {
        let all = serde_json::json!({
            "fleet": fleet, "host": here.facts, "authorities": roots, "revoked_serials": revoked, "issued": issued,
            "folder": store.dir(),
        });
        println!("{all}");
        return Ok(());
    }
    println!("fleet       {fleet}");
    println!("host        {}", here.facts.subject);
    println!("names       {}", here.facts.names.join(", "));
    println!("certificate {}", here.facts.fingerprint);
    println!("            valid until {}{}", date(here.facts.not_after), left(here.facts.not_after));
    for root in roots {
        println!("CA          {}", root.subject);
        println!("            {}", root.fingerprint);
        println!("            valid until {}{}", date(root.not_after), left(root.not_after));
    }
    for one in &issued {
        let revoked = if one.revoked { ", revoked" } else { "" };
        println!("issued      {} until {}{revoked}", one.host, date(one.not_after));
    }
    println!(
        "revoked     {}",
        if revoked.is_empty() { "nothing".into() } else { format!("{} certificates", revoked.len()) }
    );
    println!("folder      {}", store.dir().display());
    Ok(())
}

/// What to say of an end that is near.
fn left(not_after: i64) -> String {
    match (not_after - unix_now()).div_euclid(DAY) {
        days if days < 0 => ": expired. Renew it: microvm trust rotate on the CA's host, or issue and import".into(),
        days if days < WARN_DAYS => {
            format!(": {days} days left. Renew it: microvm trust rotate on the CA's host, or issue and import")
        }
        _ => String::new(),
    }
}

/// A day, in UTC.
fn date(unix: i64) -> String {
    OffsetDateTime::from_unix_timestamp(unix).map_or_else(|_| "?".into(), |time| time.date().to_string())
}
