//! Every cap of the control plane, each with its reason. A limit that is reached is an error with a name, never a
//! panic and never memory without bound.

/// Longest scheduler name, bytes (kernel `IP_VS_SCHEDNAME_MAXLEN`).
pub const SCHED_NAME_BYTES_MAX: usize = 16;

/// Longest persistence engine name, bytes (kernel `IP_VS_PENAME_MAXLEN`).
pub const ENGINE_NAME_BYTES_MAX: usize = 16;

/// Longest persistence engine data, bytes (kernel `IP_VS_PEDATA_MAXLEN`).
pub const ENGINE_DATA_BYTES_MAX: usize = 255;

/// Longest interface name, bytes, without the closing NUL (kernel `IFNAMSIZ` - 1).
pub const INTERFACE_NAME_BYTES_MAX: usize = 15;

/// Virtual services. Well above the largest tables seen in the field (about 20,000), and small enough that a full
/// listing stays a matter of seconds.
pub const SERVICES_MAX: usize = 1 << 17;

/// Dests of all services together: a connection entry names its dest with 20 bits, and number 0 means none.
pub const DESTS_MAX: usize = (1 << 20) - 1;

/// Local addresses of one service's FULLNAT pool: each gives 64,512 ports, so more than this many serve no purpose.
pub const LOCAL_ADDRESSES_MAX: usize = 256;

/// Largest weight of a dest (the kernel keeps it in an `int`).
pub const WEIGHT_MAX: u32 = i32::MAX as u32;

/// Longest timeout that `--set` and `-p` take, seconds: 31 days (`MAX_TIMEOUT` of ipvsadm).
pub const TIMEOUT_S_MAX: u32 = 31 * 24 * 3600;

/// One request line on the control socket, bytes. The longest valid request is well under 1 KiB; the rest is room for
/// clients that write their JSON with spaces.
pub const REQUEST_BYTES_MAX: usize = 16 * 1024;

/// One response line on the control socket, bytes. [`ROWS_PER_CHUNK`] of the largest rows fit with room to spare.
pub const RESPONSE_BYTES_MAX: usize = 512 * 1024;

/// Rows in one line of a streamed answer: keeps the memory of both sides flat however long the table is.
pub const ROWS_PER_CHUNK: usize = 256;

/// Requests a client may have unanswered on one connection. Their answers fit in the socket's buffers, so a client
/// that sends first and reads later never blocks itself.
pub const PIPELINE_MAX: usize = 64;

/// How long a client waits for rvsd to take a request or to go on with an answer, seconds. A change takes
/// milliseconds; this is for an rvsd that is stuck, so that scripts end.
pub const ANSWER_TIMEOUT_S: u64 = 60;

/// Lines of detail after a refusal's reason: enough to name every interface of a large host.
pub const REFUSAL_DETAIL_LINES_MAX: usize = 64;

/// CPUs in the per-CPU statistics: what fits in one answer line, and twice the largest machine of today.
pub const CPUS_MAX: usize = 2048;

/// Packets that one request may ask `rvs why` about: each copies the state of the data plane, some 20 ms with tables of the default sizes.
pub const PROBES_MAX: usize = 64;

/// Packets in one line of `rvs trace`'s answer: with 2048 bytes of each, in hexadecimal, they fit in a response line.
pub const TRACED_PER_LINE: usize = 64;

/// Datagrams whose fragments wait for their first one. Each is looked up every other millisecond, which takes a few percent of a CPU with so many.
pub const HELD_DATAGRAMS_MAX: usize = 1024;

/// ... bytes of all their frames: what the kernel gives to reassembly (`ipfrag_high_thresh`).
pub const HELD_BYTES_MAX: usize = 4 << 20;

/// ... datagrams of one source, which is a client's share: an IPv4 address, or the /64 of an IPv6 one.
pub const HELD_OF_SOURCE_MAX: usize = 64;

/// ... fragments of one datagram: 64 KiB in the smallest that networks make (576 bytes).
pub const HELD_OF_DATAGRAM_MAX: usize = 128;

/// How long they wait, ms. Networks change the order of packets within milliseconds; the 30 s of the kernel are for what is lost.
pub const HELD_MS: u64 = 3000;

/// Longest filter of `rvs trace`, bytes, and how deep its parentheses may be nested: far more than anybody types.
pub const FILTER_BYTES_MAX: usize = 4096;
pub const FILTER_DEPTH_MAX: usize = 32;
