//! What a guest is made of, and the QEMU command line that says so.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use super::child::command;
use super::{AGENT_PORT_NAME, Accelerator, TopologyError};

const QEMU: &str = "qemu-system-x86_64";
/// Memory that a back-end can map; QEMU seals it against shrinking.
const SHARED_MEMORY: &str = "memory-backend-memfd,share=on";
/// In the guest's directory.
pub(super) const MIGRATION_SOCKET: &str = "migration";

/// What a card's other side is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wire {
    /// A vhost-user back-end listens on this socket; QEMU connects, and again whenever it is gone.
    VhostUser(PathBuf),
    /// QEMU listens on this socket; the back-end connects. The guest starts with the first connection.
    VhostUserServer(PathBuf),
    /// A tap device in the guest's namespace (`vhost=off`), to compare with.
    Tap(String),
}

/// A network card.
#[derive(Debug, Clone)]
pub struct Nic {
    /// The other side.
    pub wire: Wire,
    /// MAC address, with colons.
    pub mac: String,
    /// Queue pairs.
    pub queues: u16,
    /// Addresses with prefix lengths that the guest has when it is ready.
    pub addresses: Vec<String>,
    /// Further properties of QEMU's device, such as `packed=on,rx_queue_size=1024`.
    pub properties: String,
}

impl Nic {
    /// One queue pair, no addresses.
    #[must_use]
    pub fn new(wire: Wire, mac: &str) -> Self {
        Self { wire, mac: mac.to_owned(), queues: 1, addresses: Vec::new(), properties: String::new() }
    }

    /// As many queue pairs.
    #[must_use]
    pub fn queues(mut self, queues: u16) -> Self {
        self.queues = queues;
        self
    }

    /// With this address and prefix length as well.
    #[must_use]
    pub fn address(mut self, address: &str) -> Self {
        self.addresses.push(address.to_owned());
        self
    }

    /// With these properties of QEMU's device.
    #[must_use]
    pub fn properties(mut self, properties: &str) -> Self {
        self.properties = properties.to_owned();
        self
    }

    /// The card behind a PCIe root port of its own, as libvirt has it: a modern-only device.
    fn qemu_args(&self, index: usize) -> Vec<OsString> {
        let multiqueue = if self.queues > 1 {
            // One vector per ring, one for configuration changes, one for the control queue.
            format!(",mq=on,vectors={}", 2 * self.queues + 2)
        } else {
            String::new()
        };
        let properties = match self.properties.as_str() {
            "" => String::new(),
            some => format!(",{some}"),
        };
        let netdev = match &self.wire {
            Wire::Tap(interface) => vec![
                "-netdev".to_owned(),
                format!(
                    "tap,id=net{index},ifname={interface},script=no,downscript=no,vhost=off,queues={}",
                    self.queues
                ),
            ],
            Wire::VhostUser(socket) => {
                // QEMU 9.2 renamed reconnect (seconds), which is gone by now, to reconnect-ms.
                vhost_user(index, self.queues, &format!("{},reconnect-ms=200", socket.display()))
            }
            Wire::VhostUserServer(socket) => {
                vhost_user(index, self.queues, &format!("{},server=on,wait=off", socket.display()))
            }
        };
        let device = format!(
            "virtio-net-pci,id=nic{index},netdev=net{index},mac={},bus=port{index},romfile={multiqueue}{properties}",
            self.mac
        );
        let port = format!("pcie-root-port,id=port{index},chassis={}", index + 1);
        let mut words = netdev;
        words.extend(["-device".to_owned(), port, "-device".to_owned(), device]);
        command(words)
    }
}

fn vhost_user(index: usize, queues: u16, socket: &str) -> Vec<String> {
    vec![
        "-chardev".to_owned(),
        format!("socket,id=wire{index},path={socket}"),
        "-netdev".to_owned(),
        format!("vhost-user,id=net{index},chardev=wire{index},queues={queues}"),
    ]
}

/// Kernel and initramfs that `scripts/guest-image` built.
#[derive(Debug, Clone)]
pub struct GuestImage {
    directory: PathBuf,
}

impl GuestImage {
    /// Looks in `$DREAMWIRE_GUEST_IMAGE`, then in `guest/` beside and above the running program, which is `target/guest`.
    ///
    /// # Errors
    /// `Unavailable`, naming the script to run.
    pub fn find() -> Result<Self, TopologyError> {
        let given = env::var_os("DREAMWIRE_GUEST_IMAGE").map(PathBuf::from);
        let program = env::current_exe().unwrap_or_default();
        let beside = program.ancestors().skip(1).map(|directory| directory.join("guest"));
        given
            .into_iter()
            .chain(beside)
            .find(|directory| directory.join("initramfs").is_file() && directory.join("vmlinuz").is_file())
            .map(|directory| Self { directory })
            .ok_or_else(|| TopologyError::Unavailable("there is no guest image; run scripts/guest-image".to_owned()))
    }

    /// Where it is.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The kernel.
    #[must_use]
    pub fn kernel(&self) -> PathBuf {
        self.directory.join("vmlinuz")
    }

    /// The initramfs.
    #[must_use]
    pub fn initramfs(&self) -> PathBuf {
        self.directory.join("initramfs")
    }
}

/// A guest to be.
#[derive(Debug, Clone)]
pub struct GuestSpec {
    /// For people, and for its host name.
    pub name: String,
    /// Processors.
    pub cpus: u16,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// QEMU's object for that memory, without id and size; the default shares it with the back-end.
    pub memory_backend: String,
    /// Cards; the first is eth0.
    pub nics: Vec<Nic>,
    /// The namespace that QEMU runs in; needed for tap devices.
    pub netns: Option<String>,
    /// Further QEMU arguments.
    pub qemu_args: Vec<String>,
    /// Further words of the kernel command line.
    pub kernel_args: String,
    /// Flags as `dreamwire qemu-args` prints them: a shell reads them, and memory and cards come from them alone.
    pub pasted: Option<String>,
    /// It does not boot, but waits for a guest that migrates to it.
    pub incoming: bool,
}

impl GuestSpec {
    /// One processor, 256 MiB, no cards.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            cpus: 1,
            memory_mib: 256,
            memory_backend: SHARED_MEMORY.to_owned(),
            nics: Vec::new(),
            netns: None,
            qemu_args: Vec::new(),
            kernel_args: String::new(),
            pasted: None,
            incoming: false,
        }
    }

    /// On memory of that kind, such as `memory-backend-ram`.
    #[must_use]
    pub fn memory_backend(mut self, object: &str) -> Self {
        self.memory_backend = object.to_owned();
        self
    }

    /// With memory and cards from flags that are pasted into a shell. The cards of this specification then only say
    /// which addresses the guest gives to eth0 and so on.
    #[must_use]
    pub fn pasted(mut self, flags: &str) -> Self {
        self.pasted = Some(flags.trim().to_owned());
        self
    }

    /// With another card.
    #[must_use]
    pub fn nic(mut self, nic: Nic) -> Self {
        self.nics.push(nic);
        self
    }

    /// With as many processors.
    #[must_use]
    pub fn cpus(mut self, cpus: u16) -> Self {
        self.cpus = cpus;
        self
    }

    /// QEMU runs in this namespace.
    #[must_use]
    pub fn inside(mut self, netns: &super::Netns) -> Self {
        self.netns = Some(netns.name().to_owned());
        self
    }

    /// The destination of a migration: the same machine, waiting for the guest to come ([`super::Guest::migrate_to`]). The
    /// cards' wires are its own: replace `nics`.
    #[must_use]
    pub fn incoming(mut self) -> Self {
        self.incoming = true;
        self
    }

    /// With these further QEMU arguments.
    #[must_use]
    pub fn qemu_args<'a>(mut self, words: impl IntoIterator<Item = &'a str>) -> Self {
        self.qemu_args.extend(words.into_iter().map(str::to_owned));
        self
    }

    fn kernel_command_line(&self) -> String {
        let mut line = "console=ttyS0 quiet loglevel=4 panic=-1 audit=0 8250.nr_uarts=1".to_owned();
        for (index, nic) in self.nics.iter().enumerate() {
            if !nic.addresses.is_empty() {
                line.push_str(&format!(" dreamwire.eth{index}={}", nic.addresses.join(",")));
            }
        }
        format!("{line} dreamwire.name={} {}", self.name, self.kernel_args)
    }

    /// The whole command line; sockets and logs are in `directory`.
    pub(super) fn command_line(&self, image: &GuestImage, accelerator: Accelerator, directory: &Path) -> Vec<OsString> {
        let at = |name: &str| directory.join(name).display().to_string();
        let mut words = match &self.pasted {
            // MEM is the variable that the flags leave to their user.
            Some(flags) => {
                command(["sh", "-c", &format!("MEM={}M; exec {QEMU} {flags} \"$@\"", self.memory_mib), "sh"])
            }
            None => command([QEMU]),
        };
        words.extend(command(accelerator.qemu_args()));
        words.extend(command(["-nodefaults", "-no-user-config", "-display", "none"]));
        words.extend(command(["-name", &self.name, "-smp", &self.cpus.to_string()]));
        if self.pasted.is_none() {
            let (kind, options) = self.memory_backend.split_once(',').unwrap_or((&self.memory_backend, ""));
            let memory = format!("{kind},id=memory,size={}M,{options}", self.memory_mib);
            words.extend(command(["-m", &format!("{}M", self.memory_mib), "-object", memory.trim_end_matches(',')]));
            words.extend(command(["-machine", "q35,memory-backend=memory"]));
        }
        words.extend(command(["-kernel", &image.kernel().display().to_string()]));
        words.extend(command(["-initrd", &image.initramfs().display().to_string()]));
        words.extend(command(["-append", &self.kernel_command_line()]));
        let console =
            format!("socket,id=console,path={},server=on,wait=off,logfile={}", at("console"), at("serial.log"));
        words.extend(command(["-chardev", &console, "-serial", "chardev:console"]));
        words.extend(command(["-qmp", &format!("unix:{},server=on,wait=off", at("qmp"))]));
        words.extend(command(["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"]));
        let agent = format!("socket,id=agent,path={},server=on,wait=off", at("agent"));
        let port = format!("virtserialport,chardev=agent,name={AGENT_PORT_NAME}");
        words.extend(command(["-chardev", &agent, "-device", &port]));
        if self.pasted.is_none() {
            words.extend(self.nics.iter().enumerate().flat_map(|(index, nic)| nic.qemu_args(index)));
        }
        if self.incoming {
            words.extend(command(["-incoming", &format!("unix:{}", at(MIGRATION_SOCKET))]));
        }
        words.extend(command(&self.qemu_args));
        words
    }
}
