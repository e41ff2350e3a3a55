//! Maps of one value, which the programs reach without a lookup: see `flat` in the programs' source.
//!
//! In the object they, and some numbers, are undefined symbols. The library leaves those alone (and a data section's first contents
//! it writes into its map, which maps that outlive us must not suffer): they are put into the object here, before the library sees it.

use object::elf::{FileHeader64, SHT_REL};
use object::read::elf::{FileHeader, Rel, SectionHeader, Sym};
use object::{Endianness, SectionIndex};

/// Size of a BPF instruction; a 64-bit constant takes two.
const INSTRUCTION: usize = 8;
/// `BPF_LD | BPF_IMM | BPF_DW`.
const LOAD_CONSTANT: u8 = 0x18;
/// The constant is an address inside a map's only value: the map's file descriptor, and in the second instruction the offset.
const BPF_PSEUDO_MAP_VALUE: u8 = 2;

/// What a symbol stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value {
    /// The address of a map's value; its file descriptor.
    Map(i32),
    Number(u64),
}

/// The object with the values of `symbols` where it names them. An undefined symbol that is none of them is left.
pub fn bind(object: &[u8], symbols: &[(String, Value)]) -> Result<Vec<u8>, String> {
    let mut bound = object.to_vec();
    for (at, name) in named(object).map_err(|e| format!("not an object file of BPF programs: {e}"))? {
        let Some((_, value)) = symbols.iter().find(|(n, _)| *n == name) else { continue };
        let Some(code) = bound.get_mut(at..at + 2 * INSTRUCTION).filter(|code| code[0] == LOAD_CONSTANT) else {
            return Err(format!("the object names {name} where no constant is loaded (byte {at})"));
        };
        let (source, low, high) = match value {
            Value::Map(fd) => (BPF_PSEUDO_MAP_VALUE, *fd as u32, 0),
            Value::Number(n) => (0, *n as u32, (n >> 32) as u32),
        };
        code[1] = code[1] & 0xf | source << 4;
        code[4..8].copy_from_slice(&low.to_le_bytes());
        code[12..16].copy_from_slice(&high.to_le_bytes());
    }
    Ok(bound)
}

/// Where in the object which undefined symbol is named.
fn named(object: &[u8]) -> Result<Vec<(usize, String)>, object::Error> {
    let header = FileHeader64::<Endianness>::parse(object)?;
    let endian = header.endian()?;
    let sections = header.sections(endian, object)?;
    let symbols = sections.symbols(endian, object, object::elf::SHT_SYMTAB)?;
    let mut found = Vec::new();
    for section in sections.iter().filter(|s| s.sh_type(endian) == SHT_REL) {
        let code = sections.section(SectionIndex(section.sh_info(endian) as usize))?;
        let Some((relocations, _)) = section.rel(endian, object)? else { continue };
        // Code only: debug information has relocations too.
        if code.sh_flags(endian) & u64::from(object::elf::SHF_EXECINSTR) == 0 {
            continue;
        }
        for relocation in relocations {
            let symbol = symbols.symbol(object::SymbolIndex(relocation.r_sym(endian) as usize))?;
            if symbol.is_undefined(endian) {
                let name = String::from_utf8_lossy(symbols.symbol_name(endian, symbol)?).into_owned();
                let at = code.sh_offset(endian) + relocation.r_offset(endian);
                found.push((usize::try_from(at).unwrap_or(usize::MAX / 2), name));
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All that the programs name is bound, at each place, and nothing else is changed.
    #[test]
    fn maps_are_put_where_they_are_named() {
        let object = super::super::OBJECT;
        let places = named(object).expect("an object");
        for name in ["CONN4", "CONFIG", "CLOCK", "DESTS", "VERDICTS"] {
            assert!(places.iter().any(|(_, n)| n == name), "{name} is not named");
        }
        let symbols = [("DESTS".to_owned(), Value::Map(77)), ("DESTS_MASK".to_owned(), Value::Number(0x1_0000_00ff))];
        let bound = bind(object, &symbols).expect("bound");
        assert_eq!(bound.len(), object.len());
        let of = |name: &str| places.iter().filter(|(_, n)| n == name).map(|(at, _)| *at).collect::<Vec<usize>>();
        for at in of("DESTS_MASK") {
            assert_eq!((bound[at], bound[at + 1] >> 4), (LOAD_CONSTANT, 0));
            assert_eq!((bound[at + 4..at + 8].to_vec(), bound[at + 12]), (vec![0xff, 0, 0, 0], 1));
        }
        for at in &of("DESTS") {
            assert_eq!(bound[*at], LOAD_CONSTANT);
            assert_eq!(bound[at + 1] >> 4, BPF_PSEUDO_MAP_VALUE);
            assert_eq!(bound[at + 4..at + 8], 77i32.to_le_bytes());
        }
        let changed = object.iter().zip(&bound).enumerate().filter(|(_, (a, b))| a != b).map(|(i, _)| i);
        for i in changed {
            let named = of("DESTS").into_iter().chain(of("DESTS_MASK")).any(|at| (at..at + 16).contains(&i));
            assert!(named, "byte {i} is changed");
        }
    }

    #[test]
    fn garbage_is_refused() {
        assert!(bind(b"", &[]).is_err());
        assert!(bind(&[0x7f; 300], &[]).is_err());
        let half = &super::super::OBJECT[..super::super::OBJECT.len() / 2];
        assert!(bind(half, &[]).is_err());
    }
}
