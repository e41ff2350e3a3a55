//! Numbers and addresses as the C library reads them, and large counters as ipvsadm writes them.

use std::net::Ipv4Addr;

/// `strtol` to the end of the text, within bounds: blanks before it and a sign are fine, anything after it is not.
pub fn number_in(text: &str, min: u32, max: u32) -> Option<u32> {
    let text = text.trim_start_matches(is_c_space);
    let digits = text.strip_prefix(['+', '-']).unwrap_or(text);
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let number: i64 = text.parse().ok()?;
    u32::try_from(number).ok().filter(|n| (min..=max).contains(n))
}

/// `atoi`: what leads the text, 0 if that is no number; values beyond an `int` saturate.
pub fn atoi(text: &str) -> i32 {
    let text = text.trim_start_matches(is_c_space);
    let (negative, digits) = match text.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, text.strip_prefix('+').unwrap_or(text)),
    };
    let magnitude = digits
        .bytes()
        .map_while(|b| b.is_ascii_digit().then(|| i32::from(b - b'0')))
        .fold(0_i32, |n, digit| n.saturating_mul(10).saturating_add(digit));
    if negative { -magnitude } else { magnitude }
}

fn is_c_space(c: char) -> bool {
    matches!(c, ' ' | '\t' | '\n' | '\r' | '\x0b' | '\x0c')
}

/// `inet_aton`: one to four parts, each decimal, octal (0..) or hexadecimal (0x..); the last fills the bytes that are
/// left.
pub fn inet_aton(text: &str) -> Option<Ipv4Addr> {
    let parts: Vec<&str> = text.split('.').collect();
    let (last, leading) = parts.split_last()?;
    if leading.len() > 3 {
        return None;
    }
    let mut value: u32 = 0;
    for part in leading {
        let byte = aton_part(part).filter(|n| *n <= 0xff)?;
        value = value << 8 | byte;
    }
    let free_bits = 32 - 8 * u32::try_from(leading.len()).ok()?;
    let tail = aton_part(last)?;
    if free_bits < 32 && tail >> free_bits != 0 {
        return None;
    }
    let head = if free_bits == 32 { 0 } else { value << free_bits };
    Some(Ipv4Addr::from(head | tail))
}

fn aton_part(part: &str) -> Option<u32> {
    let (digits, radix) = match part.strip_prefix("0x").or_else(|| part.strip_prefix("0X")) {
        Some(hex) => (hex, 16),
        None if part.len() > 1 && part.starts_with('0') => (&part[1..], 8),
        None => (part, 10),
    };
    // `from_str_radix` would take a sign.
    if !digits.bytes().next()?.is_ascii_hexdigit() {
        return None;
    }
    u32::from_str_radix(digits, radix).ok()
}

/// A counter in nine columns or more: from a hundred million on in thousands (K), millions (M), thousand millions (G)
/// or million millions (T), cut off, not rounded. `exact` writes every digit.
pub fn large_number(value: u64, exact: bool) -> String {
    if exact {
        let digits = value.to_string();
        let width = if digits.len() <= 8 { 9 } else { digits.len() + 1 };
        return format!("{digits:>width$}");
    }
    const TENS: [(u64, u64, char); 4] = [
        (1_000_000_000, 1_000, 'K'),
        (100_000_000_000, 1_000_000, 'M'),
        (100_000_000_000_000, 1_000_000_000, 'G'),
        (u64::MAX, 1_000_000_000_000, 'T'),
    ];
    if value < 100_000_000 {
        return format!("{value:>9}");
    }
    let (_, unit, letter) = TENS.into_iter().find(|(below, _, _)| value < *below).unwrap_or(TENS[3]);
    format!("{:>8}{letter}", value / unit)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_strtol_within_bounds() {
        assert_eq!(number_in("5", 0, 10), Some(5));
        assert_eq!(number_in(" +5", 0, 10), Some(5));
        assert_eq!(number_in("010", 0, 10), Some(10));
        assert_eq!(number_in("-0", 0, 10), Some(0));
        for text in ["", " ", "+", "-1", "11", "5 ", "0x5", "abc", "5a", "99999999999999999999", "++5"] {
            assert_eq!(number_in(text, 0, 10), None, "{text:?}");
        }
        assert_eq!(number_in("2147483647", 0, i32::MAX as u32), Some(2_147_483_647));
        assert_eq!(number_in("2147483648", 0, i32::MAX as u32), None);
    }

    #[test]
    fn atoi_takes_what_leads() {
        assert_eq!(atoi("255.255.255.0"), 255);
        assert_eq!(atoi(" 64abc"), 64);
        assert_eq!(atoi("-3"), -3);
        assert_eq!(atoi("abc"), 0);
        assert_eq!(atoi("99999999999"), i32::MAX);
    }

    #[test]
    fn addresses_are_inet_aton() {
        let ok = |text| inet_aton(text).map(|a| a.to_string());
        assert_eq!(ok("172.16.0.80").as_deref(), Some("172.16.0.80"));
        assert_eq!(ok("10.1").as_deref(), Some("10.0.0.1"));
        assert_eq!(ok("10.1.2").as_deref(), Some("10.1.0.2"));
        assert_eq!(ok("0x7f.010.1").as_deref(), Some("127.8.0.1"));
        assert_eq!(ok("4294967295").as_deref(), Some("255.255.255.255"));
        for text in
            ["", ".", "300.1.1.1", "1.2.3.4.5", "1.2.3.", "1.2.3.256", "4294967296", "0x", "09", "+1.2.3.4", "a"]
        {
            assert_eq!(ok(text), None, "{text:?}");
        }
    }

    #[test]
    fn counters_are_cut_off_by_thousands() {
        let plain = |n| large_number(n, false);
        assert_eq!(plain(0), "        0");
        assert_eq!(plain(99_999_999), " 99999999");
        assert_eq!(plain(100_000_000), "  100000K");
        assert_eq!(plain(999_999_999), "  999999K");
        assert_eq!(plain(1_000_000_000), "    1000M");
        assert_eq!(plain(99_999_999_999), "   99999M");
        assert_eq!(plain(100_000_000_000), "     100G");
        assert_eq!(plain(99_999_999_999_999), "   99999G");
        assert_eq!(plain(100_000_000_000_000), "     100T");
        assert_eq!(plain(u64::MAX), "18446744T");
    }

    #[test]
    fn exact_counters_keep_a_column_of_space() {
        assert_eq!(large_number(0, true), "        0");
        assert_eq!(large_number(99_999_999, true), " 99999999");
        assert_eq!(large_number(100_000_000, true), " 100000000");
        assert_eq!(large_number(u64::MAX, true), " 18446744073709551615");
    }
}
