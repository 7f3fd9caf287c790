//! The kinds of partitions: GUIDs of GPT, numbers of MBR, and the names people write for them.

use uuid::Uuid;

/// A kind that has a name.
struct Named {
    /// What people write; the first is what is shown.
    names: &'static [&'static str],
    guid: u128,
    /// The type in an MBR, where there is one.
    mbr: Option<u8>,
    title: &'static str,
}

const fn named(
    names: &'static [&'static str],
    guid: u128,
    mbr: Option<u8>,
    title: &'static str,
) -> Named {
    Named { names, guid, mbr, title }
}

/// Names as sfdisk and systemd-repart know them; the UEFI specification and the Discoverable
/// Partitions Specification have the numbers.
static NAMED: [Named; 18] = [
    named(
        &["linux", "L"],
        0x0fc6_3daf_8483_4772_8e79_3d69_d847_7de4,
        Some(0x83),
        "Linux filesystem",
    ),
    named(
        &["uefi", "esp", "efi", "U"],
        0xc12a_7328_f81f_11d2_ba4b_00a0_c93e_c93b,
        Some(0xef),
        "EFI System",
    ),
    named(&["swap", "S"], 0x0657_fd6d_a4ab_43c4_84e5_0933_c84b_4f4f, Some(0x82), "Linux swap"),
    named(&["bios", "bios-boot"], 0x2168_6148_6449_6e6f_744e_6565_6445_4649, None, "BIOS boot"),
    named(&["root-x86-64"], 0x4f68_bce3_e8cd_4db1_96e7_fbca_f984_b709, None, "Linux root (x86-64)"),
    named(&["root-arm64"], 0xb921_b045_1df0_41c3_af44_4c6f_280d_3fae, None, "Linux root (ARM-64)"),
    named(&["root-x86"], 0x4447_9540_f297_41b2_9af7_d131_d5f0_458a, None, "Linux root (x86)"),
    named(
        &["root-riscv64"],
        0x72ec_70a6_cf74_40e6_bd49_4bda_08e8_f224,
        None,
        "Linux root (RISC-V-64)",
    ),
    named(&["usr-x86-64"], 0x8484_680c_9521_48c6_9c11_b072_0656_f69e, None, "Linux usr (x86-64)"),
    named(&["home", "H"], 0x933a_c7e1_2eb4_4f13_b844_0e14_e2ae_f915, None, "Linux home"),
    named(&["srv"], 0x3b8f_8425_20e0_4f3b_907f_1a25_a76f_98e8, None, "Linux server data"),
    named(&["var"], 0x4d21_b016_b534_45c2_a9fb_5c16_e091_fd2d, None, "Linux variable data"),
    named(&["xbootldr"], 0xbc13_c2ff_59e6_4262_a352_b275_fd6f_7172, Some(0xea), "Linux boot"),
    named(&["raid", "R"], 0xa19d_880f_05fc_4d3b_a006_743f_0f84_911e, Some(0xfd), "Linux RAID"),
    named(&["lvm", "V"], 0xe6d6_d379_f507_44c2_a23c_238f_2a3d_f928, Some(0x8e), "Linux LVM"),
    named(
        &["windows", "msdata"],
        0xebd0_a0a2_b9e5_4433_87c0_68b6_b726_99c7,
        Some(0x07),
        "Microsoft basic data",
    ),
    named(&["msr"], 0xe3c9_e316_0b5c_4db8_817d_f92d_f002_15ae, None, "Microsoft reserved"),
    named(&["fat32"], 0, Some(0x0c), "W95 FAT32 (LBA)"),
];

/// What a GUID stands for, as people say it.
pub fn title_of_guid(guid: Uuid) -> Option<&'static str> {
    let found = NAMED.iter().find(|named| named.guid != 0 && named.guid == guid.as_u128());
    found.map(|named| named.title)
}

/// What the type of an MBR's entry stands for.
pub fn title_of_mbr(kind: u8) -> Option<&'static str> {
    let other = match kind {
        0x01 => "FAT12",
        0x04 | 0x06 | 0x0e => "FAT16",
        0x05 | 0x0f | 0x85 => "Extended",
        0x07 => "HPFS/NTFS/exFAT",
        0x0b => "W95 FAT32",
        0xa5 => "FreeBSD",
        0xee => "GPT",
        _ => {
            let found = NAMED.iter().find(|named| named.mbr == Some(kind));
            return found.map(|named| named.title);
        }
    };
    Some(other)
}

/// The names that [`guid`] takes, with their meanings.
pub fn known() -> impl Iterator<Item = (&'static str, &'static str)> {
    NAMED.iter().filter_map(|named| Some((*named.names.first()?, named.title)))
}

fn find(text: &str) -> Option<&'static Named> {
    let same = |name: &&str| name.eq_ignore_ascii_case(text);
    NAMED.iter().find(|named| named.names.iter().any(same))
}

/// The GUID that `text`, a name or a GUID itself, stands for.
pub fn guid(text: &str) -> Option<Uuid> {
    let named = find(text).filter(|named| named.guid != 0);
    named.map(|named| Uuid::from_u128(named.guid)).or_else(|| Uuid::try_parse(text).ok())
}

/// The type in an MBR that `text`, a name or a hexadecimal number, stands for; never 0, which is an
/// entry that is not used.
pub fn mbr(text: &str) -> Option<u8> {
    let digits = text.strip_prefix("0x").unwrap_or(text);
    let number = || u8::from_str_radix(digits, 16).ok().filter(|kind| *kind != 0);
    find(text).and_then(|named| named.mbr).or_else(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_numbers_are_found() {
        let linux = guid("linux").expect("known");
        assert_eq!(linux.to_string(), "0fc63daf-8483-4772-8e79-3d69d8477de4");
        assert_eq!(guid("0FC63DAF-8483-4772-8E79-3D69D8477DE4"), Some(linux));
        assert_eq!(title_of_guid(linux), Some("Linux filesystem"));
        assert_eq!((guid("fat32"), guid("no such"), guid("")), (None, None, None));
        assert_eq!((mbr("linux"), mbr("0xef"), mbr("C")), (Some(0x83), Some(0xef), Some(0x0c)));
        assert_eq!((mbr("0"), mbr("100"), mbr("bios")), (None, None, None));
        assert_eq!(title_of_mbr(0x83), Some("Linux filesystem"));
        assert_eq!(title_of_guid(Uuid::nil()), None);
        let mut guids: Vec<_> = NAMED.iter().map(|named| named.guid).collect();
        guids.sort_unstable();
        guids.dedup();
        assert_eq!(guids.len(), NAMED.len(), "two names for one GUID");
    }
}
