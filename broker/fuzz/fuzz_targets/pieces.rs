//! Inputs that are put together from pieces of a language, by which a fuzzer comes further than by bytes alone.

/// The bytes themselves, or behind an odd first byte a piece for each: up to the number of pieces that one, beyond it the byte. The one
/// in the middle stands there `times` times, and 160 times as often when that is more than 240, so that bounds are met.
pub fn made(input: &[u8], pieces: &[&str], times: usize) -> Vec<u8> {
    let [how, input @ ..] = input else { return Vec::new() };
    if how % 2 == 0 {
        return input.to_vec();
    }
    let piece = |byte: &u8| pieces.get(usize::from(*byte)).map_or(vec![*byte], |piece| piece.as_bytes().to_vec());
    let middle = input.len() / 2;
    let times = if times > 240 { times * 160 } else { times };
    let mut made = input[..middle].iter().flat_map(piece).collect::<Vec<_>>();
    if let Some(repeated) = input.get(middle) {
        made.extend(piece(repeated).repeat(times.max(1)));
    }
    made.extend(input.iter().skip(middle + 1).flat_map(piece));
    made
}
