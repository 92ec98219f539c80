//! Configurations as text: accepted, or refused with the mistakes that the text itself names.

use dreamwire::config::{Accepted, Context, Mistake, from_toml};

#[track_caller]
pub(crate) fn accept(text: &str) -> Accepted {
    from_toml(text, Context::default()).unwrap_or_else(|mistakes| panic!("{mistakes:#?}"))
}

#[track_caller]
pub(crate) fn mistakes(text: &str) -> Vec<Mistake> {
    from_toml(text, Context::default()).expect_err("a mistake should have been found")
}

/// Each line of the text that ends in a comment `#! words` must get a mistake there with those words, and no line else.
#[track_caller]
pub(crate) fn expect_marked(text: &str) {
    let found = mistakes(text);
    let mut unexplained = found.clone();
    for (index, line) in text.lines().enumerate() {
        for words in line.split("#!").skip(1).map(str::trim) {
            let number = u32::try_from(index + 1).unwrap();
            let place = unexplained
                .iter()
                .position(|mistake| mistake.line == Some(number) && mistake.to_string().contains(words))
                .unwrap_or_else(|| panic!("line {number} has no mistake with {words:?} in {found:#?}"));
            unexplained.remove(place);
        }
    }
    assert!(unexplained.is_empty(), "not expected: {unexplained:#?}\nin {text}");
}
