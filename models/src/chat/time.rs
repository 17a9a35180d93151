//! `strftime_now`: dates as Python's C locale writes them, from a clock that the caller passes in.

use minijinja::{Error, ErrorKind};

const DAY: i64 = 86_400;
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// A day of the proleptic Gregorian calendar.
struct Date {
    year: i64,
    /// From 0.
    month: usize,
    /// From 1.
    day: i64,
    /// From 0, Sunday.
    weekday: usize,
    /// From 1.
    year_day: i64,
}

/// From days since 1970-01-01; the era arithmetic is Howard Hinnant's `civil_from_days`.
fn date(days: i64) -> Date {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let from_march = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * from_march + 2) / 153;
    let day = from_march - (153 * march_month + 2) / 5 + 1;
    let month = (march_month + 2) % 12;
    let year = year_of_era + era * 400 + i64::from(month < 2);
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    let before_march = if leap { 60 } else { 59 };
    let year_day = if month < 2 { from_march - 306 + 1 } else { from_march + before_march + 1 };
    Date { year, month: month as usize, day, weekday: (days + 4).rem_euclid(7) as usize, year_day }
}

/// `now` (local seconds since 1970) in `format`; conversions that no template uses are an error.
pub(super) fn strftime(now: i64, format: &str) -> Result<String, Error> {
    // Outside of Python's years 1 to 9999 there is nothing to print.
    let now = now.clamp(-62_135_596_800, 253_402_300_799);
    let d = date(now.div_euclid(DAY));
    let second = now.rem_euclid(DAY);
    let (hour, minute) = (second / 3600, second / 60 % 60);
    let month = MONTHS.get(d.month).copied().unwrap_or_default();
    let weekday = WEEKDAYS.get(d.weekday).copied().unwrap_or_default();
    let hour12 = (hour + 11) % 12 + 1;
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut conversion = chars.next();
        let padded = conversion != Some('-');
        if !padded {
            conversion = chars.next();
        }
        let number = |n: i64, width: usize| if padded { format!("{n:0width$}") } else { n.to_string() };
        out += &match conversion {
            Some('Y') => d.year.to_string(),
            Some('y') => number(d.year.rem_euclid(100), 2),
            Some('m') => number(d.month as i64 + 1, 2),
            Some('d') => number(d.day, 2),
            Some('e') => format!("{:2}", d.day),
            Some('j') => number(d.year_day, 3),
            Some('H') => number(hour, 2),
            Some('I') => number(hour12, 2),
            Some('M') => number(minute, 2),
            Some('S') => number(second % 60, 2),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('B') => month.to_owned(),
            Some('b') => month.get(..3).unwrap_or_default().to_owned(),
            Some('A') => weekday.to_owned(),
            Some('a') => weekday.get(..3).unwrap_or_default().to_owned(),
            Some('F') => format!("{}-{:02}-{:02}", d.year, d.month + 1, d.day),
            Some('T') => format!("{hour:02}:{minute:02}:{:02}", second % 60),
            Some('%') => "%".to_owned(),
            other => {
                let message = format!("strftime_now: conversion %{} is not known", other.unwrap_or(' '));
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        };
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::strftime;

    #[test]
    fn dates_equal_pythons() {
        // datetime.fromtimestamp(t, timezone.utc).strftime("%a %d %b %Y %j %I:%M:%S %p")
        for (t, expected) in [
            (0, "Thu 01 Jan 1970 001 12:00:00 AM"),
            (1_721_995_200, "Fri 26 Jul 2024 208 12:00:00 PM"),
            (951_782_399, "Mon 28 Feb 2000 059 11:59:59 PM"),
            (951_868_799, "Tue 29 Feb 2000 060 11:59:59 PM"),
            (1_735_689_599, "Tue 31 Dec 2024 366 11:59:59 PM"),
            (-1, "Wed 31 Dec 1969 365 11:59:59 PM"),
            (4_107_542_400, "Mon 01 Mar 2100 060 12:00:00 AM"),
        ] {
            assert_eq!(strftime(t, "%a %d %b %Y %j %I:%M:%S %p").unwrap(), expected);
        }
        assert_eq!(strftime(0, "%-d %B %y 100%%").unwrap(), "1 January 70 100%");
        assert!(strftime(0, "%Q").is_err());
        assert!(strftime(i64::MAX, "%Y").is_ok() && strftime(i64::MIN, "%Y").is_ok());
    }
}
