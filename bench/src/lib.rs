//! Measures what carrying one guest access costs, per mechanism, and reports it.
//!
//! A run makes one self-contained JSON file ([`results`]); everything printed
//! afterwards (tables, claims, plots) is computed from such files alone, so a
//! file from another machine reports exactly as it would there.

pub mod assemble;
pub mod claims;
pub mod compare;
pub mod host;
pub mod plot;
pub mod report;
pub mod results;
pub mod stats;
pub mod table;
pub mod vduse;

#[cfg(test)]
mod synthetic;
