//! What attaches a virtual machine to a port: QEMU's flags, libvirt's XML.

use std::fmt::Write;

use dreamwire_datapath::mac::Mac;
use serde::Deserialize;

use crate::config::{Mode, Port};

/// For whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// Flags to paste into a shell.
    #[default]
    Qemu,
    /// A piece of a domain's XML.
    Libvirt,
}

/// QEMU's version, as far as it makes a difference: `MAJOR[.MINOR]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    major: u32,
    minor: u32,
}

impl Default for Version {
    fn default() -> Self {
        Self { major: 10, minor: 0 }
    }
}

impl std::str::FromStr for Version {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is not a QEMU version: expected one like 10.0 or 7.2");
        let mut parts = text.split('.');
        let major = parts.next().and_then(|part| part.parse().ok()).ok_or_else(wrong)?;
        let minor = parts.next().map_or(Ok(0), |part| part.parse().map_err(|_| wrong()))?;
        Ok(Self { major, minor })
    }
}

impl<'de> Deserialize<'de> for Version {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Since then `reconnect-ms` (QEMU 9.2); `reconnect` in seconds is deprecated since.
const RECONNECT_MS: Version = Version { major: 9, minor: 2 };
/// Until then a vhost-user card with MSI-X ends QEMU with SIGSEGV under TCG. Seen with 7.2.22, not with 10.0.2;
/// what lies between was not tried and gets the normal flags.
const MSIX_UNDER_TCG: Version = Version { major: 8, minor: 0 };

/// The text that attaches a VM to `port`.
pub fn attach(port: &Port, mtu: u16, format: Format, version: Version) -> String {
    match format {
        Format::Qemu => flags(port, mtu, version),
        Format::Libvirt => xml(port, mtu),
    }
}

fn flags(port: &Port, mtu: u16, version: Version) -> String {
    let Port { name, queues, .. } = port;
    let path = shell_value(&port.socket.to_string_lossy());
    let chardev = match port.mode {
        Mode::Client => "server=on,wait=off".to_owned(),
        Mode::Server if version >= RECONNECT_MS => "reconnect-ms=1000".to_owned(),
        Mode::Server => "reconnect=1".to_owned(),
    };
    // Message-signalled interrupts: two for each queue pair, one for changes of the configuration, one for control.
    let vectors = if version < MSIX_UNDER_TCG { 0 } else { 2 * queues + 2 };
    let multiqueue = match (*queues > 1, vectors) {
        (true, _) => format!(",mq=on,vectors={vectors}"),
        (false, 0) => ",vectors=0".to_owned(),
        (false, _) => String::new(),
    };
    let host_mtu = if mtu == 1500 { String::new() } else { format!(",host_mtu={mtu}") };
    let mac = mac_of(port);
    let id = name;
    let lines = [
        "-object \"memory-backend-memfd,id=mem,size=${MEM:-512M},share=on\"".to_owned(),
        "-m \"${MEM:-512M}\" -machine q35,memory-backend=mem".to_owned(),
        format!("-chardev socket,id=char-{id},path={path},{chardev}"),
        format!("-netdev vhost-user,id=net-{id},chardev=char-{id},queues={queues}"),
        format!("-device pcie-root-port,id=root-{id},chassis={}", chassis(port)),
        format!(
            "-device virtio-net-pci,netdev=net-{id},id=nic-{id},bus=root-{id},mac={mac}{multiqueue}{host_mtu},romfile="
        ),
    ];
    lines.join(" \\\n") + "\n"
}

fn xml(port: &Port, mtu: u16) -> String {
    let path = xml_text(&port.socket.to_string_lossy());
    let mac = mac_of(port);
    // libvirt's `mode` is QEMU's side of the socket.
    let (mode, reconnect) = match port.mode {
        Mode::Server => ("client", "\n    <reconnect enabled='yes' timeout='1'/>\n  </source>"),
        Mode::Client => ("server", "\n  </source>"),
    };
    let mut text = String::from("<!-- inside <domain>: the VM's memory must be shared with the daemon -->\n");
    text += "<memoryBacking>\n  <source type='memfd'/>\n  <access mode='shared'/>\n</memoryBacking>\n";
    text += "<!-- inside <devices> -->\n<interface type='vhostuser'>\n";
    let _ = writeln!(text, "  <mac address='{mac}'/>");
    let _ = writeln!(text, "  <source type='unix' path='{path}' mode='{mode}'>{reconnect}");
    text += "  <model type='virtio'/>\n";
    let _ = writeln!(text, "  <driver queues='{}'/>", port.queues);
    if mtu != 1500 {
        let _ = writeln!(text, "  <mtu size='{mtu}'/>");
    }
    text += "  <rom enabled='no'/>\n</interface>\n";
    text
}

/// The configured address, or one of its own: QEMU gives every VM the same if nobody names one.
/// Made of the host's name and the socket's path, so that it stays the same and differs between hosts.
fn mac_of(port: &Port) -> Mac {
    port.mac.unwrap_or_else(|| {
        let host = nix::unistd::gethostname().unwrap_or_default();
        let hash = fnv1a(host.as_encoded_bytes(), fnv1a(port.socket.as_os_str().as_encoded_bytes(), FNV_BASIS));
        let [.., a, b, c] = hash.to_be_bytes();
        // 52:54:00 is QEMU's own range: locally administered.
        Mac([0x52, 0x54, 0x00, a, b, c])
    })
}

/// A number that differs between the root ports of one VM: 1 to 255.
fn chassis(port: &Port) -> u64 {
    fnv1a(port.name.as_bytes(), FNV_BASIS) % 255 + 1
}

const FNV_BASIS: u64 = 0xcbf2_9ce4_8422_2325;

/// FNV-1a, 64 bits: the same in every version of this program, which the standard library's hash is not.
fn fnv1a(bytes: &[u8], basis: u64) -> u64 {
    bytes.iter().fold(basis, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// QEMU doubles commas inside a value; the shell gets single quotes where it needs them.
fn shell_value(text: &str) -> String {
    let text = text.replace(',', ",,");
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/._-,:@+".contains(&byte);
    if text.bytes().all(plain) { text } else { format!("'{}'", text.replace('\'', "'\\''")) }
}

fn xml_text(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('\'', "&apos;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Context, from_toml};

    fn port(keys: &str) -> Port {
        let text = format!("[[network]]\nname='default'\n[[port]]\nname='vm1'\nmac='52:54:00:00:00:01'\n{keys}\n");
        from_toml(&text, Context::default()).unwrap().document.port.remove(0)
    }

    #[test]
    fn flags_for_one_queue_and_a_listening_daemon() {
        let text = attach(&port(""), 1500, Format::Qemu, Version::default());
        assert!(
            text.contains("-chardev socket,id=char-vm1,path=/run/dreamwire/vm1.sock,reconnect-ms=1000 \\\n"),
            "{text}"
        );
        assert!(text.contains("-netdev vhost-user,id=net-vm1,chardev=char-vm1,queues=1 \\\n"), "{text}");
        assert!(text.ends_with("bus=root-vm1,mac=52:54:00:00:00:01,romfile=\n"), "{text}");
    }

    #[test]
    fn flags_for_several_queues_an_odd_path_and_an_odd_mtu() {
        let text = attach(&port("queues=4\nsocket=\"/tmp/it's, here\""), 1400, Format::Qemu, Version::default());
        assert!(text.contains(r"path='/tmp/it'\''s,, here',reconnect-ms=1000"), "{text}");
        assert!(text.contains(",mq=on,vectors=10,host_mtu=1400,romfile="), "{text}");
    }

    #[test]
    fn old_qemu_gets_its_work_around_and_its_spelling() {
        let text = attach(&port("queues=2"), 1500, Format::Qemu, "7.2".parse().unwrap());
        assert!(text.contains(",reconnect=1 "), "{text}");
        assert!(text.contains(",mq=on,vectors=0,romfile="), "{text}");
    }

    #[test]
    fn qemu_listens_in_client_mode() {
        let text = attach(&port("mode='client'"), 1500, Format::Qemu, Version::default());
        assert!(text.contains("vm1.sock,server=on,wait=off "), "{text}");
        let text = attach(&port("mode='client'"), 1500, Format::Libvirt, Version::default());
        assert!(text.contains("mode='server'>\n  </source>"), "{text}");
    }

    #[test]
    fn an_unnamed_mac_is_stable_and_a_ports_own() {
        let mut one = port("");
        let mut two = port("socket='/tmp/other'");
        (one.mac, two.mac) = (None, None);
        assert_eq!(mac_of(&one), mac_of(&one));
        assert_ne!(mac_of(&one), mac_of(&two));
        assert!(mac_of(&one).is_station());
    }
}
