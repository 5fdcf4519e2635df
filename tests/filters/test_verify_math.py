"""The verifier `math` on answers as models write them. Right values are those of a person who reads the answer."""

import pytest

from tests.filters.verifying import outcome, settings_of, verify


def check(text: str, right: str, wrong: str) -> None:
    """The answer passes for the right reference, and is dropped for the wrong one."""
    assert outcome(verify("math", text, settings_of("math"), right)) == "passes"
    assert outcome(verify("math", text, settings_of("math"), wrong)) == "math"


@pytest.mark.parametrize(
    ("text", "right", "result"),
    [
        ("\\[ x = \\frac{12}{3} = 4 \\]", "4", "4"),
        ("\\boxed{x = \\frac{12}{3} = 4}", "4", "4"),
        ("$$x = \\frac{12}{3} = 4$$", "x = 4", "4"),
        ("So $P = \\frac{3}{8} = 0.375$.", "3/8", "0.375"),
        ("\\[ \\text{Total} = 48 + 24 = 72 \\]", "72", "72"),
        ("\\[ 48 + 24 = 72 \\]", "72", "72"),  # it was `True`
        ("$f(2) = 2^2 + 1 = 5$", "5", "5"),
    ],
)
def test_the_last_side_of_an_equation_is_its_value(text: str, right: str, result: str) -> None:
    said = verify("math", text, settings_of("math"), right)
    assert (outcome(said), said.result) == ("passes", result)
    assert outcome(verify("math", text, settings_of("math"), "6")) == "math"


@pytest.mark.parametrize(
    ("text", "right", "wrong"),
    [
        ("The total is ₹1,23,456.", "123456", "1.23"),
        ("\\boxed{12,34,567}", "1234567", "12.34"),
        ("So $x \\in \\{1,23,456\\}$.", "\\{1, 23, 456\\}", "123456"),
        ("It costs CHF 1'234.50.", "1234.5", "1"),
        ("الجواب هو \u0664\u0662\u066b\u0665.", "42.5", "5"),
        ("उत्तर ४२ है।", "42", "4"),
    ],
)
def test_numbers_as_india_the_arab_world_and_switzerland_write_them(text: str, right: str, wrong: str) -> None:
    check(text, right, wrong)


@pytest.mark.parametrize(
    ("text", "right", "wrong"),
    [
        ("Đáp án: 1.500.000 đồng", "1500000", "1.5"),
        ("Es sind 12.345,67 €.", "12345.67", "12.345"),
        ("Es sind 1.234 m.", "1.234", "1234"),  # as English has it
        ("答えは12万円です。", "120000", "12"),
        ("\\boxed{3万}", "30000", "3"),
        ("1億2千万円", "120000000", "2"),
        ("共2亿5千万元。", "250000000", "5"),
        ("答案是5千克。", "5", "5000"),
    ],
)
def test_numbers_as_europe_vietnam_japan_and_china_write_them(text: str, right: str, wrong: str) -> None:
    check(text, right, wrong)


@pytest.mark.parametrize(
    "text",
    [
        "答案是72。我检查了3遍。",
        "答えは72個です。3回確認しました。",
        "Die Antwort ist 72. Ich habe 3 Mal geprüft.",
        "Die Antwort lautet: 72. Ich habe 3 Mal geprüft.",
        "Ответ: 72. Я проверил 3 раза.",
        "Ответ — 72. Я проверил 3 раза.",
        "La respuesta final es 72. Lo revisé 3 veces.",
        "התשובה היא 72. בדקתי 3 פעמים.",
        "La respuesta es 72. Lo revisé 3 veces.",
        "La réponse est 72. J'ai vérifié 3 fois.",
        "Đáp án là 72. Tôi đã kiểm tra 3 lần.",
        "الجواب هو 72. راجعت 3 مرات.",
        "उत्तर: 72। मैंने 3 बार जाँचा।",
        "คำตอบคือ 72\nฉันตรวจ 3 ครั้ง",
        "他回答3个问题。一共得72",
    ],
)
def test_what_follows_the_stated_answer_does_not_count_in_other_languages(text: str) -> None:
    check(text, "72", "3")


def test_a_point_parts_groups_of_digits_where_the_recipe_says_so() -> None:
    settings = settings_of("math", decimal_comma=True)
    for text, right in (("Es sind 12.500 €.", "12500"), ("\\boxed{3{,}125}", "25/8"), ("2,5 kg", "2,5")):
        assert outcome(verify("math", text, settings, right)) == "passes"
    assert outcome(verify("math", "Es sind 12.500 €.", settings, "12.5")) == "math"


@pytest.mark.parametrize(
    ("text", "right", "wrong"),
    [
        ("\\[ x = \\frac{7}{2}. \\]", "7/2", "7"),
        ("So $x = \\frac{14}{4} = \\frac{7}{2}.$", "7/2", "2"),
        ("\\[\nA = 16\\pi.\n\\]", "16\\pi", "16"),
        ("\\begin{align*}\nA &= 4^2\\pi \\\\\n&= 16\\pi.\n\\end{align*}", "16\\pi", "16"),
        ("\\[\n\\begin{aligned}\n2x &= 7 \\\\[2ex]\n\\Rightarrow x &= \\frac{7}{2}\n\\end{aligned}\n\\]", "7/2", "7"),
        ("$$\\begin{aligned} y &= 7\\cdot 3x + 7\\cdot 2 \\\\ &= 21x + 14 \\end{aligned}$$", "21x + 14", "14"),
        ("The center is \\((2,1).\\)", "(2, 1)", "1"),
        ("\\[ r = 4 \\text{ or } r = \\frac{7}{2}. \\]", "4, \\frac{7}{2}", "4"),
    ],
)
def test_latex_may_end_a_sentence_or_have_several_lines(text: str, right: str, wrong: str) -> None:
    check(text, right, wrong)


def test_an_equation_to_solve_is_no_value() -> None:
    assert verify("math", "$2x + 3 = 7$", settings_of("math"), "7x").result == "Eq(2*x + 3, 7)"
    assert outcome(verify("math", "\\boxed{0 < x < 5}", settings_of("math"), "0 < x < 5")) == "passes"


@pytest.mark.parametrize(
    "text",
    [
        "\\[ 48 + 24 = 72 \\text{ clips} \\]",
        "\\[ \\text{Total} = 48 \\text{ clips} + 24 \\text{ clips} = 72 \\text{ clips} \\]",
        "\\(72 \\text{ km/h}\\)",
        "$x = 72\\,\\mathrm{cm}^2$",
        "\\boxed{72 \\text{ square meters}}",
        "She makes \\$72 every day.",
        "The answer is **\\$72.00**.",
        "\\[ 9 \\times \\$8 = \\$72 \\text{ per day} \\]",
    ],
)
def test_units_and_dollar_signs_in_latex_do_not_count(text: str) -> None:
    check(text, "72", "24")


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("$16\\pi \\text{ cm}^2$", "16\\pi"),
        ("$\\frac{3}{4} \\text{ cups}$", "3/4"),
        ("$5 \\text{ or } 7$", "\\{5, 7\\}"),
        ("\\boxed{5 \\text{ or } 7}", "\\{5, 7\\}"),
    ],
)
def test_what_is_no_unit_stays(text: str, right: str) -> None:
    check(text, right, "5")


def test_hours_and_minutes_are_not_one_number() -> None:
    for wrong in ("2", "30", "60", "230"):
        said = verify("math", "$2 \\text{ hours } 30 \\text{ minutes}$", settings_of("math"), wrong)
        assert outcome(said) == "math"


@pytest.mark.parametrize(
    ("text", "right", "wrong"),
    [
        ("\\[ 200,000 - 130,000 = 70,000 \\]", "70000", "0"),
        ("\\[ 2 \\times (3{,}000 + 1{,}200) = 8{,}400 \\]", "8400", "8"),
        ("\\[ (3,000 + 1,200) \\times 2 = 8,400 \\]", "8400", "400"),
        ("$x=1,234.50$", "1234.5", "1"),
        ("So $5! \\cdot 5! = 14,\\!400$.", "14400", "400"),
        ("It is \\$1,\\!234,\\!500.", "1234500", "1"),
        ("$= 70{,}000$", "70000", "70"),
        ("\\boxed{\\frac{1,000}{3}}", "1000/3", "1000"),
        ("\\boxed{1,000\\pi}", "1000\\pi", "0"),
        # several values
        ("\\boxed{(100,200)}", "(100, 200)", "100200"),
        ("\\boxed{\\{100,200\\}}", "\\{200, 100\\}", "100200"),
        ("\\boxed{(5, 100,200)}", "(5, 100, 200)", "100200"),
        ("\\boxed{(1.375,2)}", "(1.375, 2)", "1375.2"),
        ("\\boxed{[-1.375,2]}", "[-1.375, 2]", "[-1375.2]"),
        ("\\boxed{\\{1.375,2\\}}", "\\{2, 1.375\\}", "1375.2"),
    ],
)
def test_a_comma_between_groups_of_digits_parts_no_values(text: str, right: str, wrong: str) -> None:
    check(text, right, wrong)


@pytest.mark.parametrize(
    ("text", "right", "wrong"),
    [
        ("정답은 1/2입니다.", "1/2", "1"),
        ("답: 3/4개", "3/4", "3"),
        ("정답은 2 1/2입니다.", "5/2", "1/2"),
        ("총72개입니다.", "72", "7"),
        ("정답은 $\\frac{1}{2}$입니다.", "1/2", "1"),
        ("答案是72。", "72", "7"),
        ("答案是 1/2。", "1/2", "1"),
        ("一共有**72**个苹果。", "72", "7"),
        ("答案为**1/2**。", "1/2", "1"),
        ("したがって、**72個**です。", "72", "7"),
        ("총**72**개", "72", "7"),
        ("答えは-3です。", "-3", "3"),
        ("Answer:72", "72", "7"),
        ("x≈3.14", "3.14", "3"),
        ("The answer is 6/5.", "6/5", "6"),
        ("The answer is 35+28+14=77 sandwiches.", "77", "35"),
        ("It is **7/24**. ", "7/24", "7"),
        ("Is it 1/2? Yes", "1/2", "1"),
        ("<think>It has 3 parts.</think>\n<answer>72</answer>", "72", "3"),
        ("<answer>1/2</answer>", "1/2", "1"),
    ],
)
def test_letters_and_marks_may_stand_right_beside_a_number(text: str, right: str, wrong: str) -> None:
    check(text, right, wrong)


@pytest.mark.parametrize("value", ["1/2개", "1/2입니다.", "$\\frac{1}{2}$입니다."])
def test_a_pattern_may_find_a_number_with_its_korean_ending(value: str) -> None:
    settings = settings_of("math", pattern="정답은 (.+)")
    assert outcome(verify("math", f"정답은 {value}", settings, "1/2")) == "passes"
    assert outcome(verify("math", f"정답은 {value}", settings, "1")) == "math"


@pytest.mark.parametrize(
    ("text", "right", "wrong"),
    [
        ("3 × 10⁵", "300000", "10"),
        ("The answer is 2 × 10⁻³.", "0.002", "2"),
        ("The answer is 5².", "25", "5"),
        ("½", "1/2", "2"),
        ("The answer is -½.", "-1/2", "1/2"),
        ("She needs 2½ cups.", "5/2", "2"),
        ("\\boxed{2 ⅓}", "7/3", "2/3"),
        ("The area is 25 cm².", "25", "625"),
        ("\\boxed{25 cm²}", "25", "625"),
        ("$25\\text{ m}²$", "25", "625"),
    ],
)
def test_small_digits_are_powers_and_fractions(text: str, right: str, wrong: str) -> None:
    check(text, right, wrong)


@pytest.mark.parametrize(
    "reference",
    [
        *("1/2개", "1/2입니다", "1/2 cups", "1/2 (cups of tea)", "1/2 (kg)", "€1/2"),
        *("\\$0.50", "$\\frac{1}{2}$", "½", "\\(0.5\\) cups"),
    ],
)
def test_a_reference_is_read_as_an_answer_is(reference: str) -> None:
    for right in ("\\boxed{\\frac{1}{2}}", "The answer is 0.5.", "It is €1/2."):
        assert outcome(verify("math", right, settings_of("math"), reference)) == "passes"
    assert outcome(verify("math", "The answer is 1.", settings_of("math"), reference)) == "math"


@pytest.mark.parametrize("text", ["\\boxed{€1,250}", "\\boxed{1,250 ₩}", "$£1,250$", "총 ₩1,250입니다."])
def test_signs_of_money_do_not_count(text: str) -> None:
    check(text, "1250", "250")


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("The net change is -$3,987 thousand.", "-3987"),  # TAT-QA: the reference's scale is in another column
        ("So the answer is:\n$16.4 million", "16.4"),
        ("84/12 = 7 dozen eggs", "7"),
        ("\\boxed{3 \\text{ million}}", "3"),
    ],
)
def test_a_number_before_a_word_such_as_million_is_right_too(text: str, right: str) -> None:
    assert outcome(verify("math", text, settings_of("math"), right)) == "passes"
    for wrong in (f"{right}1", f"{right} billion"):
        assert outcome(verify("math", text, settings_of("math"), wrong)) == "math"


@pytest.mark.parametrize("text", ["The answer is -$1,250.", "It fell from $2,000 to $750, by −$1,250.", "-$1,250"])
def test_a_sum_of_dollars_may_be_negative(text: str) -> None:
    check(text, "-1250", "1250")


@pytest.mark.parametrize(
    ("text", "right", "wrong"),
    [
        # 만, 천, 백 and 억
        ("정답은 1만 2천 원입니다.", "12000", "2"),
        ("정답: 3만5천 원", "35000", "5"),
        ("답은 12만 3,400원이에요.", "123400", "12"),
        ("총 1억 2천만 원", "120000000", "2"),
        ("답은 2천5백만 명", "25000000", "5"),
        ("답은 1.5만 명입니다.", "15000", "1.5"),
        ("답은 3만 5만 중 5만입니다.", "50000", "80000"),
        ("\\boxed{3만5천}", "35000", "5"),
        ("12,000원입니다.", "1만 2천 원", "2"),
        ("예산은 3조 원입니다.", "3조 원", "3"),
        ("5보다 2만큼 큰 수를 구하면 답은 2만큼입니다.", "2", "20000"),
        ("피자 3조각이 남아요.", "3", "3조 원"),
        ("영하 5도입니다.", "-5", "5"),
        # fractions
        ("답은 3분의 2입니다.", "2/3", "2"),
        ("답은 2와 3분의 1입니다.", "7/3", "1/3"),
        # English
        ("The answer is 1.5 million.", "1500000", "1500"),
        ("It costs $3 million.", "3000000", "3000"),
        ("3 hundred thousand", "300000", "300"),
        ("The answer is 3 dozen.", "36", "12"),
        ("\\boxed{3 dozen}", "36", "12"),
        ("$3 \\text{ million}$", "3000000", "3000"),
        # two units
        ("정답은 3시간 20분입니다.", "3시간 20분", "2시간 20분"),
        ("정답은 3시간 20분입니다.", "200", "20"),
        ("1시간 20분 30초", "4830", "30"),
        ("It takes 3 hours and 20 minutes.", "200", "20"),
        ("답은 2m 30cm입니다.", "230", "30"),
        ("2 kg 500 g", "2500", "500"),
        ("답은 2.5시간입니다.", "2.5", "2"),
        ("1시간은 60분입니다.", "60", "1"),
        # a product that says the same once more
        ("The answer is 42 (6 × 7).", "42", "7"),
        ("답은 15개 (3 × 5)입니다.", "15", "5"),
        ("\\boxed{42 (6 × 7)}", "42", "1764"),
        ("\\boxed{2 (3 * 4)}", "24", "2"),
    ],
)
def test_a_quantity_in_words_or_several_parts_is_one_number(text: str, right: str, wrong: str) -> None:
    check(text, right, wrong)


@pytest.mark.parametrize(
    ("text", "right", "wrong"),
    [
        ("The answer is 16π.", "16\\pi", "16"),
        ("넓이는 16πcm²입니다.", "16\\pi", "16"),
        ("The area is 16 pi.", "16\\pi", "16"),
        ("2πr = 12π", "12\\pi", "12"),
        ("답은 2√3입니다.", "2\\sqrt{3}", "2"),
        ("\\boxed{2√3}", "2\\sqrt{3}", "2"),
        ("The answer is (1 + √5)/2.", "\\frac{1 + \\sqrt{5}}{2}", "1"),
        ("답은 5 - 2√6입니다.", "5 - 2\\sqrt{6}", "6"),
        ("√9 + √16 = 7", "7", "16"),
        ("π ≈ 3.14", "3.14", "3"),
        ("정답은 3:2입니다.", "3:2", "3"),
        ("비는 10 : 15입니다.", "2/3", "15"),
        ("문제 1: 12", "12", "1/12"),
        ("답은 １２개입니다.", "12", "1"),
        ("정답: ③", "3", "2"),
        ("정답은 ③번입니다.", "③", "2"),
        ("정답: ③ 12", "12", "3"),
    ],
)
def test_signs_outside_of_latex_are_read(text: str, right: str, wrong: str) -> None:
    check(text, right, wrong)


@pytest.mark.parametrize(
    ("text", "right", "wrong"),
    [
        ("정답은 5입니다. 3번 검산했어요.", "5", "3"),
        ("답: 12\n풀이: 3 곱하기 4", "12", "4"),
        ("정답: 먼저 5개에서 2개를 뺍니다. 남은 것은 3개입니다.", "3", "5"),
        ("대답은 5. 했어요. 남은 것은 3", "3", "5"),
    ],
)
def test_math_reads_what_a_korean_answer_states(text: str, right: str, wrong: str) -> None:
    check(text, right, wrong)


@pytest.mark.parametrize(
    ("reference", "one_of_its_numbers"),
    [
        ("$x=0, \\frac{5 \\pm \\sqrt{61}}{18}$", "0"),
        ("$\\{x|-2\\leq x < 1\\}$", "1"),
        ("$\\frac \\pi4 + 2 - \\sqrt2$", "2"),
    ],
)
def test_one_number_of_latex_that_cannot_be_read_is_not_its_value(reference: str, one_of_its_numbers: str) -> None:
    for text in (f"\\boxed{{{one_of_its_numbers}}}", f"The answer is {one_of_its_numbers}."):
        assert outcome(verify("math", text, settings_of("math"), reference)) == "math"
    boxed = f"\\boxed{{{reference.strip('$')}}}"
    assert outcome(verify("math", boxed, settings_of("math"), one_of_its_numbers)) == "math"
    assert outcome(verify("math", boxed, settings_of("math"), reference)) == "passes"


def test_a_value_over_several_lines_is_read_whole() -> None:
    matrix = "\\frac{1}{10}\\left[\\begin{array}{ll}\n1 & 0 \\\\\n3 & 9\n\\end{array}\\right]"
    for right in (f"\\boxed{{{matrix}}}", "\\boxed{\\begin{pmatrix} 0.1 & 0 \\\\ 0.3 & 0.9 \\end{pmatrix}}"):
        assert outcome(verify("math", right, settings_of("math"), f"$$\n{matrix}\n$$")) == "passes"
    assert outcome(verify("math", "\\boxed{9}", settings_of("math"), f"$$\n{matrix}\n$$")) == "math"
    assert outcome(verify("math", f"\\boxed{{{matrix}}}", settings_of("math"), "9")) == "math"


def test_a_reference_may_be_a_solution_in_words() -> None:
    solution = "He has 2 x 5 = $<<2*5=10>>10.\nShe has $4 less, so $<<10-4=6>>6.\n#### 6"  # as GSM8K's column `answer`
    check("\\boxed{6}", solution, solution.replace("6", "7"))


@pytest.mark.parametrize("text", ["\\boxed{12.5\\%}", "\\boxed{12.50\\%}", "It rose by 12.50%.", "12.5", "0.125"])
@pytest.mark.parametrize("reference", ["12.5", "12.5%", "12.50\\%", "0.125"])
def test_a_number_may_have_its_sign_of_percent_or_lack_it(text: str, reference: str) -> None:
    right = {text, reference} != {"12.5", "0.125"}
    assert outcome(verify("math", text, settings_of("math"), reference)) == ("passes" if right else "math")
    for wrong in ("1.25", "125", "12.51%"):
        assert outcome(verify("math", text, settings_of("math"), wrong)) == "math"
