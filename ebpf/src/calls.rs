//! Entering an entry and releasing what was freed, as functions of their own, verified once each and called by all programs. Arguments
//! and results too big for registers go through per-CPU scratch memory (programs of one CPU never overlap: they run with
//! bottom halves off).

use aya_ebpf::bindings::bpf_fib_lookup as FibLookup;
use rvs_datapath::abi::SCRATCH_WORDS;
use rvs_datapath::conn::{self, Conns};
use rvs_datapath::ct::{self, Cost, EVICTABLE, Entry, Family, Key, Outcome, Patience, Rank, Slot, V4, V6};
use rvs_datapath::frag::{self, Found, Note, Part};
use rvs_datapath::packet::{Flow, Ip};
use rvs_datapath::tables::Tables;
use rvs_datapath::verdict::Verdict;

use crate::flat::{constant, flat};
use crate::maps::Maps;
use crate::words::Table;

#[repr(C)]
#[derive(Clone, Copy)]
pub struct Scratch<F: Family> {
    insert: Key<F::Words>,
    cost: Cost<F::Words>,
    release: Entry<F::Words>,
    flow: Kept<F::Words>,
    datagram: frag::Key,
    note: Note,
    /// A question for the routing table: too large for the stack of all who ask.
    query: FibLookup,
    /// The VLAN device that a frame came in by, whose tags are off; else 0.
    vlan: u64,
    /// Its tags, as they were.
    tags: u64,
    /// What the further stages begin with.
    verdict: u64,
    /// The only one that outlives a packet.
    patience: Patience,
}

/// A [`Flow`], in whole words.
#[repr(C)]
#[derive(Clone, Copy)]
struct Kept<W> {
    key: Key<W>,
    /// `len:32 | by / 4:8 | 0:5 | error:1 | sctp:1 | tcp:1 | flags:8 | ttl:8`
    rest: u64,
    part: u64,
    /// `dest:32 | cookie:32`
    known: u64,
}

const _: () = assert!(size_of::<Scratch<V4>>() <= 8 * SCRATCH_WORDS);
const _: () = assert!(size_of::<Scratch<V6>>() <= 8 * SCRATCH_WORDS);

flat! {
    Scratch4("SCRATCH4"): [u64; SCRATCH_WORDS];
    Scratch6("SCRATCH6"): [u64; SCRATCH_WORDS];
}

/// This CPU's memory of a family.
#[inline(always)]
fn scratch<I: Ip>() -> *mut Scratch<I> {
    if I::FAMILY == 4 { Scratch4::mine(0) as *mut _ } else { Scratch6::mine(0) as *mut _ }
}

/// For the further stages of this packet.
#[inline(always)]
pub fn keep<I: Ip>(flow: &Flow<I>) {
    let head =
        (flow.by as u64 / 4) << 24 | (flow.error as u64) << 18 | (flow.sctp as u64) << 17 | (flow.tcp as u64) << 16;
    let rest = (flow.len as u64) << 32 | head | (flow.flags as u64) << 8 | flow.ttl as u64;
    let known = (flow.dest as u64) << 32 | flow.cookie as u64;
    // SAFETY: this CPU's own memory, see above.
    unsafe { (*scratch::<I>()).flow = Kept { key: flow.key, rest, part: flow.part.word(), known } };
}
#[inline(always)]
pub fn kept<I: Ip>() -> Flow<I> {
    // SAFETY: as above.
    let Kept { key, rest, part, known } = unsafe { (*scratch::<I>()).flow };
    Flow {
        key,
        tcp: rest >> 16 & 1 != 0,
        sctp: rest >> 17 & 1 != 0,
        flags: (rest >> 8) as u8,
        ttl: rest as u8,
        by: (rest >> 24 & 0xff) as u16 * 4,
        part: Part::from_word(part),
        len: (rest >> 32) as u32,
        cookie: known as u32,
        dest: (known >> 32) as u32,
        error: rest >> 18 & 1 != 0,
    }
}

/// See [`Scratch`].
#[inline(always)]
pub fn query() -> *mut FibLookup {
    // SAFETY: as above.
    unsafe { &raw mut (*scratch::<V4>()).query }
}

/// The VLAN device that this frame counts as come in by; 0 is none, and is set again when its tags are on, or it has left.
#[inline(always)]
pub fn set_vlan(ifindex: u32) {
    // SAFETY: as above.
    unsafe { (*scratch::<V4>()).vlan = ifindex as u64 };
}
/// The tags that were taken off it.
#[allow(dead_code, reason = "the programs that measure have the same scratch")]
#[inline(always)]
pub fn set_tags(tags: u64) {
    // SAFETY: as above.
    unsafe { (*scratch::<V4>()).tags = tags };
}
#[allow(dead_code, reason = "as above")]
#[inline(always)]
pub fn tags() -> u64 {
    // SAFETY: as above.
    unsafe { (*scratch::<V4>()).tags }
}
#[inline(always)]
pub fn vlan() -> u32 {
    // SAFETY: as above.
    unsafe { (*scratch::<V4>()).vlan as u32 }
}

/// From one program to the next: see [`crate::stages::on`].
#[inline(always)]
pub fn go_on(verdict: Verdict) {
    // SAFETY: as above.
    unsafe { (*scratch::<V4>()).verdict = verdict.word() };
}
#[inline(always)]
pub fn gone_on() -> Verdict {
    // SAFETY: as above.
    Verdict::from_word(unsafe { (*scratch::<V4>()).verdict })
}

/// [`frag::leave`] and [`frag::find`].
#[inline(always)]
pub fn leave_note(key: &frag::Key, note: &Note) -> bool {
    let s = scratch::<V4>();
    // SAFETY: as above.
    unsafe { ((*s).datagram, (*s).note) = (*key, *note) };
    frag_leave() != 0
}
#[inline(always)]
pub fn find_note(key: &frag::Key) -> Found {
    let s = scratch::<V4>();
    // SAFETY: as above.
    unsafe { (*s).datagram = *key };
    match frag_find() {
        0 => Found::None,
        1 => Found::Conflict,
        2 => Found::Elsewhere,
        // SAFETY: as above.
        _ => Found::Note(unsafe { (*s).note }),
    }
}
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn frag_leave() -> u32 {
    let s = scratch::<V4>();
    let t = Maps::NOWHERE;
    // SAFETY: as above; nobody else borrows these fields meanwhile.
    unsafe { frag::leave(&t, &(*s).datagram, &(*s).note, t.conns4().now_s()) as u32 }
}
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn frag_find() -> u32 {
    let s = scratch::<V4>();
    let t = Maps::NOWHERE;
    // SAFETY: as above.
    match unsafe { frag::find(&t, &(*s).datagram, t.conns4().now_s()) } {
        Found::None => 0,
        Found::Conflict => 1,
        Found::Elsewhere => 2,
        Found::Note(note) => {
            // SAFETY: as above.
            unsafe { (*s).note = note };
            3
        }
    }
}

/// Which entry is to be released.
const GIVEN: u32 = 0;
const LOST: u32 = 1;
const EVICTED: u32 = 2;

macro_rules! calls {
    ($family:ty, $enter:ident, $release:ident,
     $insert_fn:ident, $room_fn:ident, $release_fn:ident, $orphans_fn:ident, $thin:ident, $thin_fn:ident, $gone:ident, $forward_fn:ident, $reverse_fn:ident) => {
        #[inline(always)]
        pub fn $enter(key: &Key<<$family as Family>::Words>, rest: u64, own: Slot) -> Outcome {
            let s = scratch::<$family>();
            // SAFETY: this CPU's own memory, see above.
            unsafe {
                (*s).insert = *key;
                (*s).cost.clear();
                let mut outcome = Outcome::from_word($insert_fn(rest, (*s).patience.spare() as u32));
                if outcome == Outcome::CROWDED {
                    (*s).patience.learn($room_fn() == 0);
                    outcome = Outcome::from_word($insert_fn(rest, EVICTABLE as u32));
                }
                if (*s).cost.lost.control != 0 {
                    $release_fn(LOST);
                }
                if (*s).cost.evicted.control != 0 {
                    crate::maps::count_evicted(<$family as Ip>::FAMILY);
                    $release_fn(EVICTED);
                }
                (*s).cost.settle(outcome, own)
            }
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $insert_fn(rest: u64, spare: u32) -> u64 {
            let s = scratch::<$family>();
            let t = Table::<$family>::NEW;
            // SAFETY: as above; nobody else borrows these fields meanwhile.
            unsafe { ct::try_insert::<$family, _>(&t, &(*s).insert, rest, spare as Rank, &mut (*s).cost).word() }
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $room_fn() -> u32 {
            let s = scratch::<$family>();
            let t = Table::<$family>::NEW;
            // SAFETY: as above.
            unsafe { !ct::make_room::<$family, _>(&t, &(*s).insert, &mut (*s).cost) as u32 }
        }

        #[inline(always)]
        pub fn $release(entry: &Entry<<$family as Family>::Words>) {
            let s = scratch::<$family>();
            // SAFETY: as above.
            unsafe { (*s).release = *entry };
            $release_fn(GIVEN);
        }
        #[inline(always)]
        fn $gone(which: u32) -> &'static Entry<<$family as Family>::Words> {
            let s = scratch::<$family>();
            // SAFETY: as above. Read where it is: a copy would be on the stack.
            unsafe {
                match which {
                    LOST => &(*s).cost.lost,
                    EVICTED => &(*s).cost.evicted,
                    _ => &(*s).release,
                }
            }
        }
        /// Two functions, since together they have more stack than is left here.
        #[inline(always)]
        fn $release_fn(which: u32) {
            if $gone(which).control & ct::REVERSE == 0 {
                $forward_fn(which)
            } else {
                $reverse_fn(which)
            };
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $forward_fn(which: u32) -> u32 {
            conn::forward_gone::<$family, _>(&Table::<$family>::NEW, $gone(which));
            0
        }
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $reverse_fn(which: u32) -> u32 {
            conn::reverse_gone::<$family, _>(&Table::<$family>::NEW, $gone(which));
            0
        }

        /// Free the orphans of a bucket.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $orphans_fn(bucket: u32) -> u32 {
            let t = Table::<$family>::NEW;
            conn::free_orphans::<$family, _>(&t, bucket);
            0
        }

        /// Thin out a bucket (`drop_entry`).
        #[inline(always)]
        pub fn $thin(bucket: u32, sweep: u32) {
            let mut way = 0;
            while way < <$family as Family>::WAYS as u32 {
                if $thin_fn(bucket, way, sweep) != 0 {
                    crate::maps::count_thinned();
                    $release_fn(GIVEN);
                }
                way += 1;
            }
        }
        /// See [`conn::thin::one`]. Whom to release lies in [`Scratch`]: that needs all of the stack that is left.
        #[unsafe(no_mangle)]
        #[inline(never)]
        pub extern "C" fn $thin_fn(bucket: u32, way: u32, sweep: u32) -> u32 {
            let Some(entry) = conn::thin::one::<$family, _>(&Table::<$family>::NEW, bucket, way as usize & 3, sweep)
            else {
                return 0;
            };
            // SAFETY: this CPU's own memory, see above.
            unsafe { (*scratch::<$family>()).release = entry };
            1
        }
    };
}

calls!(
    V4,
    enter4,
    release4,
    conn4_insert,
    conn4_room,
    release_cost4,
    conn4_orphans,
    thin4,
    conn4_thin,
    gone4,
    conn4_forward_gone,
    conn4_reverse_gone
);
calls!(
    V6,
    enter6,
    release6,
    conn6_insert,
    conn6_room,
    release_cost6,
    conn6_orphans,
    thin6,
    conn6_thin,
    gone6,
    conn6_forward_gone,
    conn6_reverse_gone
);
