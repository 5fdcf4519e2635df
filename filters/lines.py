"""Lines of JSON read as bytes: where the values of their fields are, which lines to check so that all are checked, and
lines put together. Reads and writes nothing.
"""

import numpy as np
from numba import int64, types

from filters.compiled import BYTES, NUMBERS, PLACES, Bytes, Places, byte, compiled, place

_NEWLINE, _QUOTE, _BACKSLASH, _SLASH, _U = b'\n"\\/u'
_COMMA, _COLON, _MINUS, _PLUS, _POINT, _ZERO, _NINE = b",:-+.09"
_OPEN, _CLOSE, _OPEN_LIST, _CLOSE_LIST = b"{}[]"
_SPACE, _TAB, _RETURN = b" \t\r"
_SMALL_E, _LARGE_E = b"eE"
_ESCAPES = tuple(b'"\\/bfnrtu')  # what may stand behind a backslash
_BLOCK = 128  # bytes counted together: so few that a byte holds the count
_STEP = 32  # bytes passed over together
_PRIME = 1099511628211  # of FNV-1a with 64 bits
_LONGEST_SHAPE = 1 << 12  # bytes
_MOST_SHAPES = 32  # that are known again; each line of a further one counts as a shape of its own
_STRING, _INTEGER, _FLOAT = 1, 2, 3  # stand for values in a shape
_MOST_DIGITS = 18  # before the point, of a number that is sure to be within any type's range


@compiled(types.boolean(types.uint8, types.uint8, types.uint8, types.uint8))
def _is_wrong(char: int, first: int, second: int, third: int) -> bool:
    """Whether a byte may not stand behind others in UTF-8 (Unicode Standard, table 3-7).

    `first` is the one before it, `second` the one before that.
    """
    later_wanted = (first >= 0xC0) | (second >= 0xE0) | (third >= 0xF0)
    longer_than_it_must_be = ((first == 0xE0) & (char < 0xA0)) | ((first == 0xF0) & (char < 0x90))
    half_a_surrogate_pair = (first == 0xED) & (char >= 0xA0)
    beyond_unicode = (first == 0xF4) & (char >= 0x90)
    never = (char == 0xC0) | (char == 0xC1) | (char > 0xF4)
    is_later = (char >= 0x80) & (char < 0xC0)
    return (is_later != later_wanted) | longer_than_it_must_be | half_a_surrogate_pair | beyond_unicode | never


@compiled(types.int64(BYTES))
def count_lines(data: Bytes) -> int:
    """How many lines these bytes are; -1: they are not UTF-8, or the last has no end."""
    size = place(len(data))
    if size > 0 and data[size - place(1)] != _NEWLINE:
        return -1
    wrong = False
    lines = 0
    for at in range(min(size, place(3))):  # too near to the beginning for the loop that looks back
        first = data[at - place(1)] if at >= 1 else byte(_NEWLINE)
        second = data[at - place(2)] if at >= 2 else byte(_NEWLINE)
        wrong |= _is_wrong(data[at], first, second, byte(_NEWLINE))
        lines += data[at] == _NEWLINE
    at = place(3)
    while at < size:
        stop = min(at + place(_BLOCK), size)
        newlines = byte(0)
        for index in range(at, stop):
            char = data[index]
            newlines = byte(newlines + (char == _NEWLINE))
            before = data[index - place(1)], data[index - place(2)], data[index - place(3)]
            wrong |= _is_wrong(char, before[0], before[1], before[2])
        lines += newlines
        at = stop
    return -1 if wrong else lines


@compiled(types.Tuple((types.uint64, types.boolean))(BYTES, types.uint64))
def _string_end(data: Bytes, at: int) -> tuple[int, bool]:
    r"""Where the string whose inside begins `at` has its closing quote (0: it is no JSON string), and whether it has an
    escape `\u`. The data end with a newline.
    """
    size = place(len(data))
    unicode = False
    while True:
        if at + place(_STEP) <= size:
            special = byte(0)
            for index in range(at, at + place(_STEP)):
                char = data[index]
                special |= byte((char == _QUOTE) | (char == _BACKSLASH) | (char < _SPACE))
            if special == 0:
                at += place(_STEP)
                continue
        char = data[at]
        while char != _QUOTE and char != _BACKSLASH and char >= _SPACE:
            at += place(1)
            char = data[at]
        if char == _QUOTE:
            return at, unicode
        if char != _BACKSLASH:
            return place(0), unicode
        escaped = data[at + place(1)]
        unicode |= escaped == _U
        if escaped not in _ESCAPES:
            return place(0), unicode
        at += place(2)


@compiled(types.uint64(BYTES, types.uint64))
def _behind_blanks(data: Bytes, at: int) -> int:
    while data[at] == _SPACE or data[at] == _TAB or data[at] == _RETURN:
        at += place(1)
    return at


@compiled(types.boolean(BYTES, types.uint64, BYTES, types.uint64, types.uint64))
def _alike(data: Bytes, start: int, others: Bytes, begin: int, size: int) -> bool:
    """Whether two stretches of as many bytes are the same."""
    different = byte(0)
    for offset in range(size):
        different |= data[start + offset] ^ others[begin + offset]
    return different == 0


@compiled(types.int64(BYTES, types.uint64, types.uint64, BYTES, PLACES))
def _field(data: Bytes, start: int, stop: int, keys: Bytes, key_ends: Places) -> int:
    """Which of the keys stands there, in its quotes; -1: none."""
    size = stop - start
    begin = place(0)
    for number in range(len(key_ends)):
        end = place(key_ends[number])
        if end - begin == size and _alike(data, start, keys, begin, size):
            return number
        begin = end
    return -1


@compiled(types.Tuple((types.uint64, types.uint8))(BYTES, types.uint64))
def _number(data: Bytes, start: int) -> tuple[int, int]:
    """Where a number ends, and its kind: _INTEGER or _FLOAT, or 0 for one that is not sure to be any such."""
    at = start
    first, point = start, start  # of the digits; the decimal point, `start` where there is none
    odd = False
    while True:
        char = data[at]
        if char == _MINUS:
            odd |= at != start
            first = at + place(1)
        elif char == _POINT:
            odd |= point != start or at == start
            point = at
        elif char in (_SMALL_E, _LARGE_E, _PLUS):
            odd = True
        elif char < _ZERO or char > _NINE:
            break
        at += place(1)
    has_point = point != start
    digits = (point if has_point else at) - first
    odd |= digits == 0 or digits > _MOST_DIGITS or (digits > 1 and data[first] == _ZERO)
    odd |= has_point and at - point == 1
    if odd:
        return at, byte(0)
    return at, byte(_FLOAT if has_point else _INTEGER)


@compiled(types.uint64(BYTES, types.uint64, BYTES, NUMBERS))
def _follow(data: Bytes, at: int, shape: Bytes, places: Places) -> int:
    """The newline behind a line that has the shape, 0: it has another. Sets where each byte of the shape stands."""
    for index in range(len(shape)):
        places[index] = at
        wanted = shape[index]
        if wanted >= _SPACE or wanted in (_TAB, _RETURN):
            if data[at] != wanted:
                return place(0)
            at += place(1)
        elif wanted == _STRING:
            if data[at] != _QUOTE:
                return place(0)
            at, is_odd = _string_end(data, at + place(1))
            if at == 0 or is_odd:
                return place(0)
            at += place(1)
        else:
            at, kind = _number(data, at)
            if kind != wanted:
                return place(0)
    places[len(shape)] = at
    return at if data[at] == _NEWLINE else place(0)


@compiled(
    types.Tuple((types.uint64, types.int64))(
        BYTES, types.uint64, BYTES, PLACES, types.uint8[::1], types.int64[:, ::1], types.int64[:, ::1]
    )
)
def _read_line(
    data: Bytes, at: int, keys: Bytes, key_ends: Places, shape: Bytes, fields: Places, spans: Places
) -> tuple[int, int]:
    """Sets the shape of the line, and where the fields' values start and end, in the shape and in the data.

    Returns where the next line starts (0: this is none, see read_lines), and how long the shape is: only what has room
    is set.
    """
    fields[:] = -1
    if data[at] != _OPEN:
        return place(0), 0
    length = 0
    depth, field = 0, int64(-1)
    while data[at] != _NEWLINE:
        char = data[at]
        start = at
        kind = byte(0)  # what stands in the shape for all that is read now; 0: what it is
        if char == _QUOTE:
            at, is_odd = _string_end(data, start + place(1))
            if at == 0:
                return place(0), 0
            at += place(1)
            behind = _behind_blanks(data, at)
            if data[behind] == _COLON:
                if depth == 1:
                    for index in range(start, at):
                        if data[index] == _BACKSLASH:
                            return place(0), 0
                    field = _field(data, start, at, keys, key_ends)
                    behind = _behind_blanks(data, behind + place(1))
                    if field >= 0:
                        spans[field, 0] = behind
                        fields[field, 0] = length + int64(behind - start)
            elif not is_odd:
                kind = byte(_STRING)
        elif (char >= _ZERO and char <= _NINE) or char == _MINUS:
            at, kind = _number(data, at)
        else:
            at += place(1)
            if char in (_OPEN, _OPEN_LIST):
                depth += 1
            elif char in (_CLOSE, _CLOSE_LIST):
                depth -= 1
                if depth < 0:
                    return place(0), 0
        if kind > 0:
            if length < _LONGEST_SHAPE:
                shape[length] = kind
            length += 1
        else:
            for index in range(start, at):
                if length < _LONGEST_SHAPE:
                    shape[length] = data[index]
                length += 1
        if depth == 0 or (depth == 1 and char == _COMMA):
            field = int64(-1)
        elif field >= 0 and depth == 1 and start >= spans[field, 0] and char > _SPACE:
            spans[field, 1] = at
            fields[field, 1] = length
    if depth != 0 or data[at - place(1)] != _CLOSE:
        return place(0), 0
    return at + place(1), length


@compiled(types.int64(BYTES, BYTES, PLACES, NUMBERS, types.int64[:, :, ::1], NUMBERS))
def read_lines(data: Bytes, keys: Bytes, key_ends: Places, line_starts: Places, spans: Places, unlike: Places) -> int:
    r"""Finds lines, the values of fields in them, and which lines to check so that all are checked.

    Two lines of one shape differ in nothing but what their strings hold (keys apart) and the digits of their numbers:
    both are JSON of a type, or neither is. Strings with an escape `\u` are part of the shape as they stand, and numbers
    that are long or have an exponent.

    data: UTF-8, lines, the last with its newline. keys, key_ends: the fields' keys in their quotes, one after another.
    line_starts: rows + 1. spans: rows, fields, 2: set to where a value starts and ends, if there is one. unlike: rows;
    set to the first row of each shape. Returns how many these are, or -1 where a line is not one object from its first
    byte to its last, or has a string that is none, or an escape in one of the object's keys.
    """
    shapes = np.empty((_MOST_SHAPES + 1, _LONGEST_SHAPE), np.uint8)  # the known ones, then the present line's
    sizes = np.zeros(_MOST_SHAPES + 1, np.int64)
    fields = np.full((_MOST_SHAPES + 1, len(key_ends), 2), -1)  # where their values are in the shapes
    places = np.empty(_LONGEST_SHAPE + 1, np.int64)
    size, at = place(len(data)), place(0)
    known = last = count = row = 0
    while at < size:
        line_starts[row] = at
        if known > 0:
            newline = _follow(data, at, shapes[last, : sizes[last]], places)
            if newline > 0:
                for field in range(len(key_ends)):
                    for end in range(2):
                        if fields[last, field, end] >= 0:
                            spans[row, field, end] = places[fields[last, field, end]]
                at = newline + place(1)
                row += 1
                continue
        at, sizes[known] = _read_line(data, at, keys, key_ends, shapes[known], fields[known], spans[row])
        if at == 0:
            return -1
        found = known
        for number in range(known):
            if sizes[number] == sizes[known] and _alike(
                shapes[number], place(0), shapes[known], place(0), place(sizes[known])
            ):
                found = number
        if found == known:
            unlike[count] = row
            count += 1
            if known < _MOST_SHAPES and sizes[known] <= _LONGEST_SHAPE:
                known += 1
        if found < known:
            last = found
        row += 1
    line_starts[row] = size
    return count


@compiled(types.void(BYTES, PLACES, PLACES, NUMBERS))
def first_alike(data: Bytes, starts: Places, ends: Places, first: Places) -> None:
    """For each value, sets which is the first that is the same, byte for byte; itself, where there is none before."""
    slots = place(4)
    while slots < 2 * len(starts):
        slots *= place(2)
    taken = np.full(slots, -1, np.int64)
    for index in range(len(starts)):
        start, size = place(starts[index]), place(ends[index] - starts[index])
        mixed = place(size)  # FNV-1a, four lanes side by side: only where to look, so any two values may meet
        second, third, fourth = mixed + place(1), mixed + place(2), mixed + place(3)
        for offset in range(start, start + size - size % place(4), place(4)):
            mixed = (mixed ^ place(data[offset])) * place(_PRIME)
            second = (second ^ place(data[offset + place(1)])) * place(_PRIME)
            third = (third ^ place(data[offset + place(2)])) * place(_PRIME)
            fourth = (fourth ^ place(data[offset + place(3)])) * place(_PRIME)
        mixed = (mixed ^ (second >> place(7))) * place(_PRIME) ^ (third >> place(13)) ^ fourth
        slot = (mixed ^ (mixed >> place(32))) & (slots - place(1))
        while True:
            other = taken[slot]
            if other < 0:
                taken[slot] = other = index
                break
            begin = place(starts[other])
            if place(ends[other]) - begin == size and _alike(data, start, data, begin, size):
                break
            slot = (slot + place(1)) & (slots - place(1))
        first[index] = other


@compiled(types.void(BYTES, PLACES, PLACES, BYTES, PLACES, types.uint8[::1]))
def join_pairs(data: Bytes, starts: Places, ends: Places, tails: Bytes, tail_ends: Places, joined: Bytes) -> None:
    """Writes each stretch of the data and its tail behind it: the tails stand one after another, and end where said."""
    at = tail_at = place(0)
    for index in range(len(starts)):
        for source in range(place(starts[index]), place(ends[index])):
            joined[at] = data[source]
            at += place(1)
        while tail_at < place(tail_ends[index]):
            joined[at] = tails[tail_at]
            at += place(1)
            tail_at += place(1)
