"""Small Python functions to write, each with the tests that say whether an answer is right.

`rows()` is what `prompts.file` draws from. A row's reference is its list of tests. Add your own to FUNCTIONS: the
signature, what the function does, and its tests, one a line.
"""

from collections.abc import Iterator

FUNCTIONS = r"""
add(a, b) | returns the sum of a and b
add(2, 3) == 5
add(-1, 1) == 0

is_even(n) | returns True if n is even, and False if it is odd
is_even(4) is True
is_even(7) is False
is_even(0) is True

factorial(n) | returns the factorial of n, which is at least 0
factorial(0) == 1
factorial(5) == 120

fibonacci(n) | returns the n-th Fibonacci number, where fibonacci(0) is 0 and fibonacci(1) is 1
fibonacci(0) == 0
fibonacci(10) == 55

reverse_text(text) | returns the text backwards
reverse_text("abc") == "cba"
reverse_text("") == ""

count_vowels(text) | returns how many vowels (a, e, i, o, u, in either case) the text has
count_vowels("Hello World") == 3
count_vowels("XYZ") == 0

is_palindrome(text) | returns whether the text reads the same backwards, without regard to case and spaces
is_palindrome("Never odd or even")
not is_palindrome("hello")

largest(numbers) | returns the largest number of a list, or None if it is empty
largest([3, 9, 2]) == 9
largest([]) is None
largest([-5, -2]) == -2

mean(numbers) | returns the mean of a list of numbers, or 0 if it is empty
mean([1, 2, 3]) == 2
mean([]) == 0

median(numbers) | returns the median of a list of numbers that is not empty
median([3, 1, 2]) == 2
median([4, 1, 3, 2]) == 2.5

unique(items) | returns the items of a list without repeats, in the order in which they first appear
unique([1, 2, 1, 3, 2]) == [1, 2, 3]
unique([]) == []

flatten(lists) | returns one list with the items of a list of lists
flatten([[1, 2], [], [3]]) == [1, 2, 3]
flatten([]) == []

chunks(items, size) | returns a list of lists of at most size items each, in order
chunks([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]]
chunks([], 3) == []

word_counts(text) | returns a dict of each word of the text, in lower case and split at spaces, and how often it appears
word_counts("a b A") == {"a": 2, "b": 1}
word_counts("") == {}

longest_word(text) | returns the longest word of a text split at spaces, the first of them if several are as long
longest_word("the quick brown fox") == "quick"
longest_word("one") == "one"

capitalize_words(text) | returns the text with the first letter of each word in upper case and the rest as it is
capitalize_words("hello big world") == "Hello Big World"
capitalize_words("") == ""

remove_vowels(text) | returns the text without the vowels a, e, i, o, u in either case
remove_vowels("Education") == "dctn"
remove_vowels("xyz") == "xyz"

is_prime(n) | returns whether n is a prime number
is_prime(2) and is_prime(13)
not is_prime(1)
not is_prime(9)

primes_up_to(n) | returns a list of the prime numbers up to n, n included
primes_up_to(10) == [2, 3, 5, 7]
primes_up_to(1) == []

gcd(a, b) | returns the greatest common divisor of two positive integers
gcd(12, 18) == 6
gcd(7, 5) == 1

lcm(a, b) | returns the least common multiple of two positive integers
lcm(4, 6) == 12
lcm(5, 7) == 35

digit_sum(n) | returns the sum of the digits of an integer, whose sign does not matter
digit_sum(1234) == 10
digit_sum(-56) == 11

to_binary(n) | returns the binary digits of a number that is not negative as text, without a prefix
to_binary(5) == "101"
to_binary(0) == "0"

from_binary(text) | returns the number that a text of binary digits means
from_binary("101") == 5
from_binary("0") == 0

celsius(fahrenheit) | returns a temperature in degrees Celsius, rounded to one decimal
celsius(212) == 100.0
celsius(100) == 37.8

leap_year(year) | returns whether a year is a leap year of the Gregorian calendar
leap_year(2024) and leap_year(2000)
not leap_year(1900)

grade(points) | returns "A" from 90 points, "B" from 80, "C" from 70, and "F" below that
grade(95) == "A" and grade(90) == "A"
grade(70) == "C"
grade(12) == "F"

fizzbuzz(n) | returns a list for 1 to n: "FizzBuzz" if 15 divides it, "Fizz" if 3, "Buzz" if 5, else the number as text
fizzbuzz(5) == ["1", "2", "Fizz", "4", "Buzz"]
fizzbuzz(15)[-1] == "FizzBuzz"

merge_sorted(a, b) | returns one sorted list of two sorted lists
merge_sorted([1, 4], [2, 3, 9]) == [1, 2, 3, 4, 9]
merge_sorted([], [1]) == [1]

second_largest(numbers) | returns the second largest different number of a list, or None if there is none
second_largest([5, 1, 5, 3]) == 3
second_largest([2, 2]) is None

rotate(items, steps) | returns the list rotated to the right by so many steps
rotate([1, 2, 3, 4], 1) == [4, 1, 2, 3]
rotate([1, 2, 3], 5) == [2, 3, 1]
rotate([], 2) == []

is_anagram(a, b) | returns whether two texts have the same letters, without regard to case and spaces
is_anagram("Dormitory", "dirty room")
not is_anagram("abc", "abd")

caesar(text, shift) | returns the text with each letter a-z moved on by shift, around the alphabet, all else as it is
caesar("xyz", 3) == "abc"
caesar("hi there", 1) == "ij uifsf"

run_lengths(text) | returns a list of pairs (character, count) for each run of equal characters
run_lengths("aab") == [("a", 2), ("b", 1)]
run_lengths("") == []

common(a, b) | returns a sorted list of the different items that two lists have in common
common([3, 1, 2, 3], [3, 2, 5]) == [2, 3]
common([1], []) == []

transpose(matrix) | returns the transposed matrix of a list of equally long rows, as a list of lists
transpose([[1, 2, 3], [4, 5, 6]]) == [[1, 4], [2, 5], [3, 6]]
transpose([[1]]) == [[1]]

dot(a, b) | returns the dot product of two equally long lists of numbers
dot([1, 2, 3], [4, 5, 6]) == 32
dot([], []) == 0

clamp(x, low, high) | returns x, or low if x is smaller, or high if x is larger
clamp(5, 1, 10) == 5
clamp(-5, 1, 10) == 1
clamp(50, 1, 10) == 10

invert(mapping) | returns a dict with keys and values exchanged
invert({"a": 1, "b": 2}) == {1: "a", 2: "b"}
invert({}) == {}

group_by_length(words) | returns a dict of each length and the list of the words with that length, in their order
group_by_length(["hi", "yo", "hey"]) == {2: ["hi", "yo"], 3: ["hey"]}
group_by_length([]) == {}

running_sum(numbers) | returns a list of the sums of the numbers so far
running_sum([1, 2, 3]) == [1, 3, 6]
running_sum([]) == []

differences(numbers) | returns a list of each number minus the one before it
differences([1, 4, 9]) == [3, 5]
differences([7]) == []

zigzag(a, b) | returns a list that takes items from two equally long lists in turn, starting with a
zigzag([1, 3], [2, 4]) == [1, 2, 3, 4]
zigzag([], []) == []

balanced(text) | returns whether the brackets (), [] and {} of a text are closed in the right order
balanced("a(b[c]{d})")
not balanced("(]")
not balanced("((")

title_initials(name) | returns the initials of a name in upper case, each followed by a point
title_initials("ada lovelace") == "A.L."
title_initials("Grace") == "G."

count_lines(text) | returns how many lines of a text are not empty
count_lines("a\n\nb") == 2
count_lines("") == 0

parse_pairs(text) | returns the dict that a text such as "a=1;b=2" means, its values as integers; empty for no text
parse_pairs("a=1;b=2") == {"a": 1, "b": 2}
parse_pairs("") == {}

seconds(text) | returns the seconds of a time such as "01:02:03"
seconds("01:02:03") == 3723
seconds("00:00:00") == 0

clock(seconds) | returns a time in seconds as "HH:MM:SS"
clock(3723) == "01:02:03"
clock(59) == "00:00:59"

triangle(a, b, c) | returns "equilateral", "isosceles", "scalene", or "none" if the three lengths make no triangle
triangle(2, 2, 2) == "equilateral"
triangle(2, 2, 3) == "isosceles"
triangle(1, 2, 9) == "none"

collatz(n) | returns how many steps the Collatz sequence takes from n to 1
collatz(1) == 0
collatz(6) == 8

roman(n) | returns a number from 1 to 3999 in Roman numerals
roman(4) == "IV"
roman(1994) == "MCMXCIV"

power_of_two(n) | returns whether an integer is a power of two
power_of_two(1) and power_of_two(64)
not power_of_two(0)
not power_of_two(12)

divisors(n) | returns a sorted list of the positive divisors of a positive integer
divisors(12) == [1, 2, 3, 4, 6, 12]
divisors(1) == [1]

perfect(n) | returns whether a positive integer is the sum of its divisors other than itself
perfect(6) and perfect(28)
not perfect(12)

missing(numbers) | returns the one number of 1 to n that is missing in a list of the n - 1 others
missing([1, 2, 4]) == 3
missing([2]) == 1

most_common(items) | returns the item of a list that appears most often, the first of them if several do
most_common([1, 2, 2, 3]) == 2
most_common(["b", "a"]) == "b"

binary_search(items, target) | returns the index of target in a sorted list without repeats, or -1
binary_search([1, 3, 5, 7], 5) == 2
binary_search([1, 3], 4) == -1

snake_case(name) | returns a camelCase name in snake_case
snake_case("camelCaseName") == "camel_case_name"
snake_case("plain") == "plain"

mask(text) | returns the text with all but its last four characters replaced by *
mask("1234567890") == "******7890"
mask("abc") == "abc"
"""
ASKED = [
    "Write a Python function {signature} that {does}.",
    "In Python, implement {signature}. It {does}.",
    "I need a Python function `{signature}`: it {does}. Only the code, please.",
]


def rows() -> Iterator[dict[str, object]]:
    """Each function, asked for in three ways."""
    for asked in ASKED:
        for entry in FUNCTIONS.strip().split("\n\n"):
            head, *tests = entry.splitlines()
            signature, does = head.split(" | ")
            yield {
                "prompt": asked.format(signature=signature, does=does),
                "reference": [f"assert {test}" for test in tests],
                "function": signature.partition("(")[0],
            }
