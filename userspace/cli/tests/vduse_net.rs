//! `ioregion vduse net` with the kernel's own drivers: VDUSE, virtio_vdpa and virtio_net, with
//! the interface in one network namespace and the TAP device in another.
//!
//! Runs where these are loaded and `/dev` belongs to the test: in the VM of
//! `cargo xtask vm --test vduse_net`.

mod support;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, Shutdown, UdpSocket};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use ioregion_vduse::{Control, DeviceConfig};
use nix::net::if_::if_nametoindex;
use support::net::{NetService, command, datagrams, interface_of, ip, ping, transfer};
use support::{driver, wait};

/// Bits of features.
const CSUM: usize = 0;
const GUEST_CSUM: usize = 1;
const GUEST_TSO4: usize = 7;
const HOST_TSO4: usize = 11;
const MERGEABLE: usize = 15;
const PACKED: usize = 34;
const GUEST_USO4: usize = 54;
const HOST_USO: usize = 56;

/// How much is sent each way.
const MIB: u64 = 4;
/// Bytes of a packet that needs no segmentation.
const WHOLE: u64 = 1514;

/// What keeps a connection busy.
static SEVENS: [u8; 1 << 16] = [7; 1 << 16];

/// Bytes and packets that the TAP device had in a direction.
fn passed(service: &NetService, way: &str) -> (u64, u64) {
    let count = |what: &str| service.tap_says(&format!("statistics/{way}_{what}"));
    (count("bytes"), count("packets"))
}

/// Pings of all sizes and a bulk transfer each way and both ways, with every byte compared;
/// packets are as large as the offloads let them be.
fn traffic_flows(number: u8, options: &[&str]) {
    let service = NetService::start(number, options);
    let without = |what: &str| options.contains(&what);
    let offloads = !without("offloads");
    for bit in [
        CSUM, GUEST_CSUM, GUEST_TSO4, HOST_TSO4, GUEST_USO4, HOST_USO,
    ] {
        assert_eq!(service.has(bit), offloads, "feature {bit}");
    }
    assert_eq!(service.has(MERGEABLE), !without("mergeable-buffers"));
    assert_eq!(service.has(PACKED), without("--packed"));

    let [outside, inside] = service.addresses();
    for len in [0, 1, 56, 1472, 1473, 20_000, 65_000] {
        ping(inside, len);
        service.namespace.enter(|| ping(outside, len));
    }

    let mut ends: Vec<IpAddr> = vec![outside.into()];
    match service.addresses_v6() {
        Some([outside, _]) => ends.push(outside.into()),
        None => println!("this kernel has no IPv6: IPv4 alone is tested"),
    }
    for end in ends {
        let (outside, inside) = service.connect(end);
        for (from, to, way) in [(&inside, &outside, "rx"), (&outside, &inside, "tx")] {
            let before = passed(&service, way);
            let start = Instant::now();
            transfer(from, to, MIB);
            let rate = (MIB << 20) as f64 / start.elapsed().as_secs_f64() / 1e6;
            let now = passed(&service, way);
            let (bytes, packets) = (now.0 - before.0, now.1 - before.1);
            let mean = bytes / packets;
            println!(
                "{options:?}, {end}, {way}: {packets} packets of {mean} bytes, {rate:.0} MB/s"
            );
            match offloads {
                // Linux sends at least two segments at once.
                true => assert!(mean > WHOLE * 3 / 2, "{mean} bytes in a packet"),
                false => assert!(mean <= WHOLE, "{mean} bytes in a packet"),
            }
        }
        std::thread::scope(|scope| {
            scope.spawn(|| transfer(&inside, &outside, MIB / 2));
            transfer(&outside, &inside, MIB / 2);
        });
    }
    if offloads {
        let socket = |addr: Ipv4Addr| UdpSocket::bind((addr, 0)).unwrap();
        let (outside, inside) = (socket(outside), service.namespace.enter(|| socket(inside)));
        for (from, to, way) in [(&inside, &outside, "rx"), (&outside, &inside, "tx")] {
            let before = passed(&service, way);
            datagrams(from, to);
            let packets = passed(&service, way).1 - before.1;
            println!("{options:?}, {way}: 31 datagrams in {packets} packets");
            // virtio_net leaves what it sends to the kernel's own segmentation until it is told
            // otherwise by ethtool; what it takes it takes whole.
            assert!(
                way == "rx" || packets < 15,
                "31 datagrams in {packets} packets"
            );
        }
    }
    let said = service.end();
    for lost in ["malformed: 0", "unsuited: 0", "too_large: 0"] {
        assert!(said.contains(lost), "{lost}");
    }
}

#[test]
fn traffic_flows_with_offloads() {
    traffic_flows(1, &[]);
}

#[test]
fn traffic_flows_without_offloads() {
    traffic_flows(2, &["--without", "offloads"]);
}

#[test]
fn traffic_flows_through_packed_queues() {
    traffic_flows(3, &["--packed"]);
}

#[test]
fn traffic_flows_through_packed_queues_without_offloads() {
    traffic_flows(
        4,
        &["--packed", "--without", "offloads", "--queue-size", "64"],
    );
}

#[test]
fn traffic_flows_in_buffers_that_take_the_largest_packets() {
    traffic_flows(5, &["--without", "mergeable-buffers"]);
}

#[test]
fn traffic_flows_in_buffers_that_take_whole_packets_only() {
    let options = ["--without", "mergeable-buffers", "--without", "offloads"];
    traffic_flows(6, &options);
}

#[test]
fn interface_has_the_address_and_the_mtu_and_the_tap_stays_where_it_was_made_before() {
    ip("tuntap add dev tap7 mode tap");
    ip("link set tap7 mtu 9000");
    for round in 0..2 {
        let service = NetService::start(7, &["--mac", "52:54:00:ab:cd:07"]);
        let shown = service.namespace.enter(|| {
            let shown = std::process::Command::new("ip")
                .args(["-oneline", "link", "show", &service.interface])
                .output();
            String::from_utf8(shown.unwrap().stdout).unwrap()
        });
        for expected in ["mtu 9000", "52:54:00:ab:cd:07", "LOWER_UP"] {
            assert!(shown.contains(expected), "{shown}");
        }
        ping(service.addresses()[1], 8972);
        service.end();
        assert!(if_nametoindex("tap7").is_ok(), "round {round}");
        ip("address flush dev tap7");
    }
    ip("link delete tap7");
}

#[test]
fn tap_that_was_made_for_the_service_goes_with_it() {
    let service = NetService::start(8, &[]);
    assert!(if_nametoindex("tap8").is_ok());
    service.end();
    assert!(if_nametoindex("tap8").is_err());
}

#[test]
fn driver_may_let_go_under_load_and_come_back() {
    // With an address that stays, or the other side's table of neighbours would be wrong.
    let mut service = NetService::start(9, &["--mac", "52:54:00:ab:cd:09"]);
    let [outside, inside] = service.addresses();
    for round in 0..3 {
        ping(inside, 1000);
        let (one, other) = service.connect(outside.into());
        std::thread::scope(|scope| {
            let busy = scope.spawn(|| while (&one).write_all(&SEVENS).is_ok() {});
            let mut got = vec![0; 1 << 20];
            (&other).read_exact(&mut got).unwrap();
            driver("unbind", &service.name);
            assert!(got.iter().all(|&byte| byte == 7), "round {round}");
            // Nobody answers any more.
            one.shutdown(Shutdown::Both).unwrap();
            busy.join().unwrap();
        });
        let gone = service.interface.as_str();
        assert!(service.namespace.enter(|| if_nametoindex(gone)).is_err());
        driver("bind", &service.name);
        service.interface = interface_of(&service.name, || {});
        service.plug_in();
    }
    ping(inside, 1000);
    service.end();
}

#[test]
fn service_ends_under_load() {
    let service = NetService::start(10, &["--packed"]);
    let (one, other) = service.connect(service.addresses()[0].into());
    std::thread::scope(|scope| {
        let busy = scope.spawn(|| while (&one).write_all(&SEVENS).is_ok() {});
        (&other).read_exact(&mut vec![0; 1 << 20]).unwrap();
        service.end();
        one.shutdown(Shutdown::Both).unwrap();
        busy.join().unwrap();
    });
}

#[test]
fn tap_that_is_removed_ends_the_traffic_and_nothing_else() {
    ip("tuntap add dev tap11 mode tap");
    let service = NetService::start(11, &[]);
    ping(service.addresses()[1], 100);
    ip("link delete tap11");
    // Both queues notice: the one that waits for packets, and the one with packets to send.
    service.namespace.enter(|| {
        let socket = std::net::UdpSocket::bind("0.0.0.0:0").unwrap();
        let _ = socket.send_to(&[0], (service.addresses()[0], 9));
    });
    std::thread::sleep(Duration::from_secs(2));
    let said = service.end();
    assert!(said.contains("the TAP device tap11 was removed"), "{said}");
}

#[test]
fn service_that_cannot_start_says_why_and_leaves_nothing_behind() {
    let service = NetService::start(12, &[]);
    ip("link add name veth12 type veth peer name veth12b");
    let fails = |name: &str, tap: &str, says: &[&str]| {
        let mut child = command(name, tap).stderr(Stdio::piped()).spawn().unwrap();
        assert_eq!(wait(&mut child).code(), Some(1));
        let mut text = String::new();
        let mut stderr = child.stderr.take().unwrap();
        stderr.read_to_string(&mut text).unwrap();
        for word in says {
            assert!(text.contains(word), "{text}");
        }
    };
    fails("other12", "tap12", &["tap12", "another process has it"]);
    fails("other12", "veth12", &["veth12", "no TAP device"]);
    fails("other12", "a/b", &["cannot be a network interface's name"]);
    fails("net12", "tap12b", &["net12", "File exists"]);
    assert!(!Path::new("/dev/vduse/other12").exists());
    assert!(if_nametoindex("tap12b").is_err());
    ip("link delete veth12");
    ping(service.addresses()[1], 100);
    service.end();
}

#[test]
fn kernel_refuses_the_control_queue_and_what_needs_it() {
    let control = Control::open().unwrap();
    let needed = 1 << 32 | 1 << 33;
    let create = |features| {
        control.create(&DeviceConfig {
            name: "controlled".into(),
            device_id: 1,
            vendor_id: 0,
            features,
            queues: 3,
            config: vec![0; 12],
        })
    };
    let control_queue = 1 << 17;
    let error = create(needed | control_queue).unwrap_err().to_string();
    for word in ["controlled", "VIRTIO_NET_F_CTRL_VQ", "Invalid argument"] {
        assert!(error.contains(word), "{error}");
    }
    assert!(!Path::new("/dev/vduse/controlled").exists());
    // It is the control queue that is refused, and nothing else of the same device.
    create(needed).unwrap();
    assert!(Path::new("/dev/vduse/controlled").exists());
    control.destroy("controlled").unwrap();
    assert!(!Path::new("/dev/vduse/controlled").exists());
    assert!(fs::exists("/dev/vduse/control").unwrap());
}
