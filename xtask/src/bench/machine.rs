//! A machine for BPF programs that counts the instructions it executes, in the place of performance counters: the same number on every
//! host. It knows what the data plane uses: maps of one value (by symbol), one hash map, a few helpers that it answers itself. A helper
//! counts as one instruction, as does a 64-bit constant.

use std::collections::HashMap;

use anyhow::{Context, Result, bail};
use object::read::elf::ElfFile64;
use object::{Object, ObjectSection, ObjectSymbol, RelocationTarget, SectionIndex, SectionKind};
use rvs_sys::bpf::{GATES, Shape};

/// Addresses begin here: 0 is null.
const BASE: u64 = 0x1000;
const STACK: u64 = 4096;
/// A map that is reached by lookups has no memory here: its number is this and more.
const LOOKED_UP: u64 = 1 << 40;
/// So has a function whose address is taken: section and byte are in its number, below this.
const FUNCTION: u64 = 1 << 60;
const FP: usize = 10;

/// What a program ran into.
#[derive(Debug, PartialEq, Eq)]
pub struct Run {
    pub returned: u64,
    pub instructions: u64,
    pub atomics: u64,
}

/// Where an instruction is: section and byte.
type Place = (usize, usize);

pub struct Machine {
    memory: Vec<u8>,
    code: HashMap<usize, Vec<u8>>,
    /// What a constant stands for, and where a call goes.
    constants: HashMap<Place, u64>,
    calls: HashMap<Place, Place>,
    programs: HashMap<String, Place>,
    maps: HashMap<String, u64>,
    /// Arrays of programs, by what a constant says of them.
    gates: HashMap<u64, &'static [&'static str]>,
    /// Of the hash map: key, and address of the value.
    keys: HashMap<Vec<u8>, u64>,
    /// What `bpf_fib_lookup` writes into its parameters: offset and bytes.
    pub route: Vec<(u64, Vec<u8>)>,
}

impl Machine {
    /// `shapes`: the maps of one value. One CPU.
    pub fn new(object: &[u8], shapes: &[Shape]) -> Result<Machine> {
        let file = ElfFile64::<object::Endianness>::parse(object)?;
        let mut m = Machine {
            memory: Vec::new(),
            code: HashMap::new(),
            constants: HashMap::new(),
            calls: HashMap::new(),
            programs: HashMap::new(),
            maps: HashMap::new(),
            gates: HashMap::new(),
            keys: HashMap::new(),
            route: Vec::new(),
        };
        for s in shapes {
            let at = m.allocate(s.words * 8 * s.len as usize);
            m.maps.insert(s.name.to_owned(), at);
        }
        let mut data: HashMap<SectionIndex, u64> = HashMap::new();
        for section in file.sections() {
            match section.kind() {
                SectionKind::Text => drop(m.code.insert(section.index().0, section.data()?.to_vec())),
                SectionKind::ReadOnlyData | SectionKind::Data => {
                    let bytes = section.data()?;
                    let at = m.allocate(bytes.len());
                    m.write(at, bytes)?;
                    data.insert(section.index(), at);
                }
                _ => {}
            }
        }
        for symbol in file.symbols().filter(ObjectSymbol::is_definition) {
            if let (Some(section), Ok(name)) = (symbol.section_index(), symbol.name())
                && m.code.contains_key(&section.0)
            {
                m.programs.insert(name.to_owned(), (section.0, symbol.address() as usize));
            }
        }
        for section in file.sections().filter(|s| s.kind() == SectionKind::Text) {
            for (offset, relocation) in section.relocations() {
                let place = (section.index().0, offset as usize);
                let RelocationTarget::Symbol(index) = relocation.target() else {
                    bail!("a relocation without a symbol")
                };
                m.relocate(place, &file.symbol_by_index(index)?, shapes, &data)?;
            }
        }
        Ok(m)
    }

    fn relocate<'a>(
        &mut self,
        place: Place,
        symbol: &impl ObjectSymbol<'a>,
        shapes: &[Shape],
        data: &HashMap<SectionIndex, u64>,
    ) -> Result<()> {
        let [op, _, _, immediate] = self.decode(place)?;
        let name = symbol.name()?;
        match symbol.section_index() {
            // A call's operand is in instructions from the section's start, less one, if the symbol is the section.
            Some(section) if self.code.contains_key(&section.0) => {
                let at = match symbol.kind() {
                    object::SymbolKind::Section => (immediate + 1) * 8,
                    _ => symbol.address() as i64,
                };
                if op == 0x85 {
                    self.calls.insert(place, (section.0, at as usize));
                } else {
                    // (Here it is in bytes.)
                    let at = symbol.address() + immediate as u64;
                    self.constants.insert(place, FUNCTION | (section.0 as u64) << 32 | at);
                }
            }
            Some(section) => {
                let value = match data.get(&section) {
                    Some(at) => at + symbol.address() + immediate as u64,
                    // In .maps: a map that is looked up.
                    None => LOOKED_UP + symbol.index().0 as u64,
                };
                if let Some((_, programs)) = GATES.iter().find(|(map, _)| *map == name) {
                    self.gates.insert(value, programs);
                }
                self.constants.insert(place, value);
            }
            None => drop(self.constants.insert(place, self.number(name, shapes)?)),
        }
        Ok(())
    }

    /// What the loader would put in the place of an undefined symbol.
    fn number(&self, name: &str, shapes: &[Shape]) -> Result<u64> {
        if let Some(at) = self.maps.get(name) {
            return Ok(*at);
        }
        // Tables that flows come from: there are none.
        if name.starts_with("OLD") {
            return Ok(0);
        }
        let Some((map, what)) = name.rsplit_once('_') else { bail!("what is {name}?") };
        let shape = shapes.iter().find(|s| s.name == map);
        match (shape, what) {
            (Some(s), "MASK") => Ok(u64::from(s.len) - 1),
            // One CPU: its part is the first.
            (Some(_), "BYTES") => Ok(0),
            (None, "MASK") if map == "CPUS" => Ok(0),
            _ => bail!("what is {name}?"),
        }
    }

    pub fn allocate(&mut self, bytes: usize) -> u64 {
        let at = BASE + self.memory.len() as u64;
        self.memory.resize((self.memory.len() + bytes + 64).next_multiple_of(64), 0);
        at
    }
    pub fn write(&mut self, at: u64, bytes: &[u8]) -> Result<()> {
        let range = self.range(at, bytes.len())?;
        self.memory[range].copy_from_slice(bytes);
        Ok(())
    }
    pub fn read(&self, at: u64, bytes: usize) -> Result<Vec<u8>> {
        Ok(self.memory[self.range(at, bytes)?].to_vec())
    }
    fn range(&self, at: u64, bytes: usize) -> Result<std::ops::Range<usize>> {
        let from = at.checked_sub(BASE).context("an access to no memory")? as usize;
        let to = from.saturating_add(bytes);
        if to > self.memory.len() {
            bail!("an access to no memory: {at:#x}");
        }
        Ok(from..to)
    }
    /// An entry of a map of one value.
    pub fn set(&mut self, map: &str, index: u32, value: &[u8]) -> Result<()> {
        let at = *self.maps.get(map).with_context(|| format!("no map {map}"))?;
        self.write(at + u64::from(index) * value.len() as u64, value)
    }
    /// The first bytes of a map.
    pub fn get(&self, map: &str, bytes: usize) -> Result<Vec<u8>> {
        let at = *self.maps.get(map).with_context(|| format!("no map {map}"))?;
        self.read(at, bytes)
    }
    pub fn insert(&mut self, key: &[u8], value: u64) -> Result<()> {
        let at = self.allocate(8);
        self.write(at, &value.to_le_bytes())?;
        self.keys.insert(key.to_vec(), at);
        Ok(())
    }

    fn load(&self, at: u64, size: usize) -> Result<u64> {
        let mut word = [0; 8];
        word[..size].copy_from_slice(&self.memory[self.range(at, size)?]);
        Ok(u64::from_le_bytes(word))
    }
    fn store(&mut self, at: u64, size: usize, value: u64) -> Result<()> {
        self.write(at, &value.to_le_bytes()[..size])
    }

    /// Opcode, registers, offset, immediate.
    fn decode(&self, (section, at): Place) -> Result<[i64; 4]> {
        let code = self.code.get(&section).and_then(|c| c.get(at..at + 8)).context("a jump to no code")?;
        let offset = i16::from_le_bytes([code[2], code[3]]);
        let immediate = i32::from_le_bytes([code[4], code[5], code[6], code[7]]);
        Ok([i64::from(code[0]), i64::from(code[1]), i64::from(offset), i64::from(immediate)])
    }

    /// Run a program to its end.
    pub fn run(&mut self, program: &str, context: u64) -> Result<Run> {
        let begin = *self.programs.get(program).with_context(|| format!("no program {program}"))?;
        let memory = self.memory.len();
        let mut run = Run { returned: 0, instructions: 0, atomics: 0 };
        let done = self.execute(begin, [context, 0], &mut run).with_context(|| program.to_owned());
        // Its stack.
        self.memory.truncate(memory);
        run.returned = done?;
        Ok(run)
    }

    /// What it returns, called with two arguments.
    fn execute(&mut self, begin: Place, arguments: [u64; 2], run: &mut Run) -> Result<u64> {
        let mut r = [0u64; 11];
        r[1..3].copy_from_slice(&arguments);
        r[FP] = self.allocate(STACK as usize) + STACK;
        let mut frames: Vec<(Place, [u64; 5])> = Vec::new();
        let mut place = begin;
        loop {
            run.instructions += 1;
            if run.instructions > 1 << 20 {
                bail!("a program without end");
            }
            let [op, registers, offset, immediate] = self.decode(place)?;
            let (dst, src) = ((registers & 0xf) as usize, (registers >> 4) as usize);
            let mut next = (place.0, place.1 + 8);
            let jump = |by: i64| (place.0, (place.1 as i64 + 8 + 8 * by) as usize);
            let size = [4, 2, 1, 8][(op >> 3 & 3) as usize];
            match (op & 7, op) {
                (_, 0x18) => {
                    let high = self.decode(next)?[3];
                    let plain = immediate as u32 as u64 | (high as u64) << 32;
                    r[dst] = self.constants.get(&place).copied().unwrap_or(plain);
                    next.1 += 8;
                }
                (4 | 7, _) => {
                    let operand = if op & 8 != 0 { r[src] } else { immediate as u64 };
                    r[dst] = alu(op, r[dst], operand, immediate, offset)?;
                }
                (1, _) => {
                    let value = self.load(r[src].wrapping_add_signed(offset), size)?;
                    let unused = 64 - 8 * size as u32;
                    r[dst] = if op & 0xe0 == 0x80 { (((value << unused) as i64) >> unused) as u64 } else { value };
                }
                (3, _) if op & 0xe0 == 0xc0 => {
                    run.atomics += 1;
                    self.atomic(r[dst].wrapping_add_signed(offset), size, immediate, src, &mut r)?;
                }
                (2 | 3, _) => {
                    let value = if op & 7 == 3 { r[src] } else { immediate as u64 };
                    self.store(r[dst].wrapping_add_signed(offset), size, value)?;
                }
                (_, 0x95) => match frames.pop() {
                    Some((back, saved)) => {
                        next = back;
                        r[6..].copy_from_slice(&saved);
                    }
                    None => return Ok(r[0]),
                },
                (_, 0x85) if src == 1 => {
                    frames.push((next, [r[6], r[7], r[8], r[9], r[10]]));
                    r[FP] = self.allocate(512) + 512;
                    next = self.calls.get(&place).copied().unwrap_or(jump(immediate));
                }
                // A tail call: in the place of the function that it is in, and so back to whom called that.
                (_, 0x85) if immediate == 12 => {
                    let programs = self.gates.get(&r[2]).context("a tail call through no array of programs")?;
                    // (There is no elder: the call does nothing then.)
                    if let Some(name) = programs.get(r[3] as usize) {
                        next = *self.programs.get(*name).with_context(|| format!("no program {name}"))?;
                        r[FP] = self.allocate(512) + 512;
                    }
                }
                // loop: rounds, function and its argument. It ends when that returns 1.
                (_, 0x85) if immediate == 181 => {
                    let body = ((r[2] & !FUNCTION) >> 32) as usize;
                    let body = (body, r[2] as u32 as usize);
                    let mut i = 0;
                    while i < r[1] {
                        i += 1;
                        if self.execute(body, [i - 1, r[3]], run)? != 0 {
                            break;
                        }
                    }
                    r[0] = i;
                }
                (_, 0x85) => r[0] = self.help(immediate, &r)?,
                (_, 0x05) => next = jump(offset),
                (_, 0x06) => next = jump(immediate),
                (5 | 6, _) => {
                    let operand = if op & 8 != 0 { r[src] } else { immediate as u64 };
                    if holds(op, r[dst], operand)? {
                        next = jump(offset);
                    }
                }
                _ => bail!("instruction {op:#x}"),
            }
            place = next;
        }
    }

    fn atomic(&mut self, at: u64, size: usize, what: i64, src: usize, r: &mut [u64; 11]) -> Result<()> {
        let old = self.load(at, size)?;
        match what {
            0xf1 => {
                if old == r[0] {
                    self.store(at, size, r[src])?;
                }
                r[0] = old;
            }
            0 | 1 => {
                self.store(at, size, old.wrapping_add(r[src]))?;
                if what == 1 {
                    r[src] = old;
                }
            }
            _ => bail!("atomic operation {what:#x}"),
        }
        Ok(())
    }

    /// The helpers, by number.
    fn help(&mut self, number: i64, r: &[u64; 11]) -> Result<u64> {
        const KEY: usize = size_of::<rvs_datapath::abi::ServiceKey>();
        Ok(match number {
            // map_lookup_elem
            1 => self.keys.get(&self.read(r[2], KEY)?).copied().unwrap_or(0),
            // get_prandom_u32
            7 => 0x1234_5678,
            // get_smp_processor_id
            8 => 0,
            // xdp_adjust_head: the first words of the context are where the packet begins and ends.
            44 => {
                let at = self.load(r[1], 4)?.wrapping_add_signed(i64::from(r[2] as i32));
                self.store(r[1], 4, at)?;
                0
            }
            // xdp_adjust_tail
            65 => {
                let end = self.load(r[1] + 4, 4)?.wrapping_add_signed(i64::from(r[2] as i32));
                self.store(r[1] + 4, 4, end)?;
                0
            }
            // xdp_load_bytes
            189 => {
                let from = self.load(r[1], 4)? + r[2];
                let bytes = self.read(from, r[4] as usize)?;
                self.write(r[3], &bytes)?;
                0
            }
            // redirect
            23 => 4,
            // fib_lookup
            69 => {
                for (offset, bytes) in self.route.clone() {
                    self.write(r[2] + offset, &bytes)?;
                }
                0
            }
            other => bail!("helper {other}"),
        })
    }
}

fn alu(op: i64, a: u64, b: u64, immediate: i64, offset: i64) -> Result<u64> {
    let wide = op & 7 == 7;
    let (a, b) = if wide { (a, b) } else { (a & 0xffff_ffff, b & 0xffff_ffff) };
    let bits = if wide { 63 } else { 31 };
    let by = (b & bits) as u32;
    let value = match op >> 4 {
        0x0 => a.wrapping_add(b),
        0x1 => a.wrapping_sub(b),
        0x2 => a.wrapping_mul(b),
        0x3 if offset == 0 => a.checked_div(b).unwrap_or(0),
        0x4 => a | b,
        0x5 => a & b,
        0x6 => a << by,
        0x7 => a >> by,
        0x8 => a.wrapping_neg(),
        0x9 if offset == 0 => a.checked_rem(b).unwrap_or(a),
        0xa => a ^ b,
        0xb if offset == 0 => b,
        0xc if wide => ((a as i64) >> by) as u64,
        0xc => ((a as i32) >> by) as u32 as u64,
        // To big endian; the 64-bit class swaps always, and this host is little-endian.
        0xd if op & 8 != 0 || wide => a.swap_bytes() >> (64 - immediate),
        _ => bail!("instruction {op:#x}"),
    };
    // Byte swaps have their own width.
    Ok(if wide || op >> 4 == 0xd { value } else { value & 0xffff_ffff })
}

fn holds(op: i64, a: u64, b: u64) -> Result<bool> {
    let wide = op & 7 == 5;
    let (a, b) = if wide { (a, b) } else { (a & 0xffff_ffff, b & 0xffff_ffff) };
    let (x, y) = if wide { (a as i64, b as i64) } else { (i64::from(a as i32), i64::from(b as i32)) };
    Ok(match op >> 4 {
        0x1 => a == b,
        0x2 => a > b,
        0x3 => a >= b,
        0x4 => a & b != 0,
        0x5 => a != b,
        0x6 => x > y,
        0x7 => x >= y,
        0xa => a < b,
        0xb => a <= b,
        0xc => x < y,
        0xd => x <= y,
        _ => bail!("jump {op:#x}"),
    })
}
