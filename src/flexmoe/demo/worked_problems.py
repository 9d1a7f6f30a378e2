"""Generated mathematics text: exercises with solutions that sympy computes.

A document is a short exercise sheet on one topic. Topic, wording, names, numbers and notation (plain or LaTeX) come from
a seeded generator, so sheets share phrases but not solutions.

Does not cover proofs. The steps of a solution need not be those of a textbook.
"""

# ruff: noqa: E501 - a sentence of a template is easier to read on one line
from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import sympy
from sympy import Integer, Rational, Symbol

Topic = Callable[["Sheet"], str]
TOPICS: dict[str, Topic] = {}

_NAMES = [
    "Ada",
    "Bela",
    "Chen",
    "Dora",
    "Emil",
    "Farah",
    "Goran",
    "Hana",
    "Ines",
    "Jonas",
    "Kemal",
    "Lena",
    "Mateo",
    "Nora",
    "Omar",
    "Paula",
    "Quinn",
    "Rosa",
    "Sami",
    "Tara",
]
_GOODS = ["apples", "notebooks", "tickets", "tiles", "bolts", "candles", "seedlings", "stamps", "bricks", "marbles"]


@dataclass
class Sheet:
    """The state of the generator: random numbers, and the notation of a document."""

    rng: random.Random
    latex: bool
    variable: Symbol = field(default_factory=lambda: Symbol("x"))

    def formula(self, expression: object) -> str:
        """The expression in the notation of this sheet."""
        if self.latex:
            return f"${sympy.latex(expression)}$"
        return sympy.sstr(expression).replace("**", "^").replace("*", " ")

    def number(self, low: int, high: int, *, zero: bool = False) -> int:
        """A random integer in [low, high]; zero only if `zero` is true."""
        while True:
            value = self.rng.randint(low, high)
            if value or zero:
                return value

    def say(self, *wordings: str) -> str:
        """A random choice of several wordings."""
        return self.rng.choice(wordings)

    def polynomial(self, degree: int, size: int = 9) -> sympy.Expr:
        """A random polynomial of exactly this degree with integer coefficients."""
        x = self.variable
        lower = [self.number(-size, size, zero=True) * x**power for power in range(degree)]
        return sympy.Add(self.number(-size, size) * x**degree, *lower)


def worked_problems(count: int, seed: int = 0) -> list[str]:
    """Returns `count` exercise sheets, deterministic for a given seed."""
    rng = random.Random(seed)
    sheets = []
    for _ in range(count):
        sheet = Sheet(rng, latex=rng.random() < 0.5, variable=Symbol(rng.choice("xyztuns")))
        name = rng.choice(sorted(TOPICS))
        exercises = [TOPICS[name](sheet) for _ in range(rng.choice((2, 2, 3, 4)))]
        heading = sheet.say(
            f"Worked problems: {name}.", f"Exercises on {name}, with solutions.", f"{name.capitalize()}."
        )
        lead = rng.choice(("Problem", "Exercise", "Question"))
        sheets.append("\n\n".join([heading, *(f"{lead} {i}. {text}" for i, text in enumerate(exercises, 1))]))
    return sheets


def topic(name: str) -> Callable[[Topic], Topic]:
    """Registers a function that returns an exercise with its solution."""

    def register(function: Topic) -> Topic:
        TOPICS[name] = function
        return function

    return register


@topic("linear equations")
def linear_equation(s: Sheet) -> str:
    x, a, b, c = s.variable, s.number(2, 15), s.number(-40, 40), s.number(-12, 12)
    root = Rational(s.number(-24, 24), s.number(1, 4))
    if a == c:
        c += 1
    right = c * x + (a - c) * root + b
    f = s.formula
    return (
        f"{s.say('Solve for', 'Find')} {f(x)}: {f(a * x + b)} = {f(right)}.\n"
        f"{s.say('Solution.', 'Answer.')} {s.say('Collecting the terms in', 'We bring everything with')} {f(x)} "
        f"{s.say('on one side gives', 'to the left and get')} {f((a - c) * x)} = {f((a - c) * root)}. "
        f"{s.say('Dividing by', 'Division of both sides by')} {f(Integer(a - c))} {s.say('yields', 'leaves')} {f(x)} = {f(root)}. "
        f"{s.say('Check:', 'Indeed,')} {s.say('both sides equal', 'left and right are both')} {f(a * root + b)}."
    )


@topic("quadratic equations")
def quadratic(s: Sheet) -> str:
    x, p, q, a = s.variable, s.number(-12, 12), s.number(-12, 12), s.number(1, 4)
    f, expanded = s.formula, sympy.expand(a * (x - p) * (x - q))
    b, c = -a * (p + q), a * p * q
    text = f"{s.say('Find all roots of', 'Solve', 'Determine the zeros of')} {f(expanded)} = 0.\nSolution. "
    if s.rng.random() < 0.5:
        text += (
            f"The discriminant is {f(Integer(b))}^2 - 4 ({a})({c}) = {b * b - 4 * a * c}, whose square root is "
            f"{abs(a * (p - q))}. {s.say('By the quadratic formula', 'Hence')} {f(x)} = ({-b} ± {abs(a * (p - q))}) / {2 * a}"
        )
    else:
        text += (
            f"{s.say('We look for', 'We need')} two numbers with sum {p + q} and product {p * q}; {p} and {q} "
            f"{s.say('do', 'work')}. {s.say('So the polynomial factors as', 'The factored form is')} {f(a * (x - p) * (x - q))}"
        )
    return text + f", {s.say('that is', 'and so')} {f(x)} = {p}{'' if p == q else f' or {f(x)} = {q}'}."


@topic("derivatives by the product rule")
def product_rule(s: Sheet) -> str:
    x, f = s.variable, s.formula
    k = s.number(2, 7)
    u = s.polynomial(s.number(1, 3))
    v = s.rng.choice((sympy.sin(k * x), sympy.cos(k * x), sympy.exp(k * x), sympy.log(x), sympy.exp(-x)))
    du, dv = sympy.diff(u, x), sympy.diff(v, x)
    return (
        f"Differentiate g({x}) = ({f(u)}) {f(v)} {s.say(f'with respect to {x}', f'for the variable {x}')}.\n"
        f"Solution. {s.say('Put', 'Let')} u = {f(u)} and v = {f(v)}. Then u' = {f(du)} and v' = {f(dv)}. "
        f"{s.say('The product rule gives', 'From (u v)′ = u′ v + u v′ we obtain')} "
        f"g'({x}) = {f(sympy.expand(du * v + u * dv))}."
    )


@topic("derivatives by the chain rule")
def chain_rule(s: Sheet) -> str:
    x, f, inner, n = s.variable, s.formula, s.polynomial(s.number(1, 2)), s.number(2, 9)
    name, outer = s.rng.choice(
        (("sin", sympy.sin), ("cos", sympy.cos), ("exp", sympy.exp), (f"the power {n}", lambda w: w**n))
    )
    h = outer(inner)
    at = s.number(-2, 2, zero=True)
    return (
        f"{s.say('Compute the derivative of', 'Find the slope function of')} h({x}) = {f(h)}, and its value at {f(x)} = {at}.\n"
        f"Solution. The outer function is {name}, the inner one is {f(inner)} with derivative {f(sympy.diff(inner, x))}. "
        f"{s.say('Multiplying the two derivatives', 'By the chain rule')}, h'({x}) = {f(sympy.diff(h, x))}. "
        f"At {f(x)} = {at} this is {f(sympy.diff(h, x).subs(x, at))}."
    )


@topic("definite integrals")
def integral(s: Sheet) -> str:
    x, f, p = s.variable, s.formula, s.polynomial(s.number(1, 4))
    a = s.number(-4, 3, zero=True)
    b = a + s.number(1, 5)
    primitive = sympy.integrate(p, x)
    upper, lower = primitive.subs(x, b), primitive.subs(x, a)
    return (
        f"{s.say('Evaluate the integral of', 'Find the area under', 'Integrate')} {f(p)} from {f(x)} = {a} to {f(x)} = {b}.\n"
        f"Solution. {s.say('An antiderivative is', 'Integrating term by term gives')} F({x}) = {f(primitive)}. "
        f"{s.say('By the fundamental theorem', 'Hence')} the integral is F({b}) - F({a}) = {f(upper)} - ({f(lower)}) = {f(upper - lower)}."
    )


@topic("systems of two linear equations")
def linear_system(s: Sheet) -> str:
    f, x, y = s.formula, Symbol("x"), Symbol("y")
    p, q = s.number(-9, 9), s.number(-9, 9)
    a, b, c, d = (s.number(-7, 7) for _ in range(4))
    if a * d == b * c:
        d += 1 if d != -1 else 2
    first, second = a * p + b * q, c * p + d * q
    return (
        f"{s.say('Solve the system', 'Find x and y such that')} {f(a * x + b * y)} = {first} and {f(c * x + d * y)} = {second}.\n"
        f"Solution. The determinant is ({a})({d}) - ({b})({c}) = {a * d - b * c}. "
        f"{s.say('Multiply the first equation by', 'We multiply the first line by')} {d} and the second by {b} and subtract: "
        f"{f((a * d - b * c) * x)} = {first * d - second * b}, so x = {p}. "
        f"{s.say('Substituting back', 'Putting this into the first equation')}, {f(b * y)} = {first - a * p} and y = {q}."
    )


@topic("matrices of order two")
def matrix(s: Sheet) -> str:
    f, m = s.formula, sympy.Matrix(2, 2, [s.number(-8, 8, zero=True) for _ in range(4)])
    n = sympy.Matrix(2, 2, [s.number(-6, 6, zero=True) for _ in range(4)])
    det, lam = m.det(), Symbol("lambda")
    rows = f"[[{m[0, 0]}, {m[0, 1]}], [{m[1, 0]}, {m[1, 1]}]]"
    if s.rng.random() < 0.5:
        return (
            f"Let A = {f(m) if s.latex else rows}. {s.say('Give its trace, determinant and characteristic polynomial.', 'When is A - λI singular?')}\n"
            f"Solution. The trace is {m[0, 0]} + {m[1, 1]} = {m.trace()}, the determinant {m[0, 0] * m[1, 1]} - ({m[0, 1] * m[1, 0]}) = {det}. "
            f"{s.say('Hence', 'So')} the characteristic polynomial is {f(lam**2 - m.trace() * lam + det)}, and A is "
            f"{'singular' if det == 0 else 'invertible'}."
        )
    product = m * n
    return (
        f"{s.say('Multiply', 'Compute the product of')} A = {rows} {s.say('by', 'and')} B = [[{n[0, 0]}, {n[0, 1]}], [{n[1, 0]}, {n[1, 1]}]].\n"
        f"Solution. Row by column: the upper left entry is ({m[0, 0]})({n[0, 0]}) + ({m[0, 1]})({n[1, 0]}) = {product[0, 0]}; "
        f"the others are {product[0, 1]}, {product[1, 0]} and {product[1, 1]}. "
        f"The determinant of the product is {det} times {n.det()}, which is {product.det()}."
    )


@topic("the greatest common divisor")
def euclid(s: Sheet) -> str:
    g = s.number(1, 30)
    a, b = g * s.number(11, 97), g * s.number(5, 60)
    steps, left, right = [], max(a, b), min(a, b)
    while right:
        steps.append(f"{left} = {left // right} · {right} + {left % right}")
        left, right = right, left % right
    return (
        f"{s.say('Find', 'Determine')} the greatest common divisor of {a} and {b} {s.say('with the algorithm of Euclid', 'by repeated division')}, "
        f"and their least common multiple.\nSolution. {s.say('We divide with remainder:', 'The divisions are')} {'; '.join(steps)}. "
        f"The last remainder that is not zero is {left}. {s.say('Therefore', 'So')} gcd({a}, {b}) = {left} and "
        f"lcm({a}, {b}) = {a} · {b} / {left} = {a * b // left}."
    )


@topic("prime factors and divisors")
def factors(s: Sheet) -> str:
    n = s.number(200, 90_000)
    parts = sympy.factorint(n)
    text = " · ".join(f"{p}^{e}" if e > 1 else f"{p}" for p, e in parts.items())
    return (
        f"{s.say('Write', 'Decompose')} {n} {s.say('as a product of primes', 'into prime factors')} and count its divisors.\n"
        f"Solution. {s.say('Trial division gives', 'Dividing by the primes in turn,')} {n} = {text}. "
        f"{'It is itself prime. ' if len(parts) == 1 and n in parts else ''}"
        f"Raising each exponent by one and multiplying, there are {sympy.divisor_count(n)} divisors; their sum is "
        f"{sympy.divisor_sigma(n)}, and {sympy.totient(n)} of the numbers up to {n} are coprime to it."
    )


@topic("arithmetic and geometric progressions")
def progression(s: Sheet) -> str:
    a, n = s.number(-20, 30), s.number(5, 40)
    f = s.formula
    if s.rng.random() < 0.5:
        d = s.number(-9, 12)
        last = a + (n - 1) * d
        return (
            f"An arithmetic progression starts with {a} and has common difference {d}. {s.say('Find', 'Give')} its term number {n} "
            f"and the sum of the first {n} terms.\nSolution. The term is {a} + {n - 1} · ({d}) = {last}. "
            f"The sum is {n} times the mean of first and last term: {n} · ({a} + ({last})) / 2 = {f(Rational(n * (a + last), 2))}."
        )
    r, n = Rational(s.number(1, 5), s.number(2, 6)), s.number(3, 7)
    total = sympy.together(sum(a * r**i for i in range(n)))
    tail = (
        f"The infinite series converges to {f(a / (1 - r))}."
        if r < 1
        else "The infinite series diverges, as the ratio is not below one."
    )
    return (
        f"{s.say('Sum', 'Add up')} the first {n} terms of the geometric progression with first term {a} and ratio {f(r)}.\n"
        f"Solution. {s.say('The terms are', 'We have')} {', '.join(f(a * r**i) for i in range(n))}. "
        f"{s.say('Their sum is', 'Together they make')} {f(total)}. {tail}"
    )


@topic("limits of rational functions")
def limit(s: Sheet) -> str:
    x, f, p = s.variable, s.formula, s.number(-7, 7)
    u, v = s.polynomial(1), s.number(-9, 9)
    v = v + 1 if v == -p else v
    top, bottom = sympy.expand((x - p) * u), sympy.expand((x - p) * (x + v))
    value = u.subs(x, p) / Integer(p + v)
    return (
        f"{s.say('Find the limit of', 'Evaluate the limit of')} ({f(top)}) / ({f(bottom)}) as {f(x)} {s.say('tends to', 'approaches')} {p}.\n"
        f"Solution. Both numerator and denominator vanish at {p}, so {f(x - p)} is a common factor: "
        f"the quotient equals ({f(u)}) / ({f(x + v)}) elsewhere. Inserting {f(x)} = {p} gives "
        f"{f(u.subs(x, p))} / {p + v} = {f(value)}. For large {f(x)} the quotient tends to {f(sympy.LC(u, x))}."
    )


@topic("percentages and prices")
def prices(s: Sheet) -> str:
    who, goods = s.rng.choice(_NAMES), s.rng.choice(_GOODS)
    count, cents, percent = s.number(3, 60), s.number(15, 900), s.rng.choice((5, 8, 10, 12, 15, 20, 25, 30, 40))
    full = Rational(count * cents, 100)
    saved = full * Rational(percent, 100)
    return (
        f"{who} {s.say('buys', 'orders', 'needs')} {count} {goods} at {cents / 100:.2f} {s.say('euros', 'dollars', 'francs')} each. "
        f"{s.say('The shop takes off', 'There is a discount of')} {percent} percent. "
        f"How much {s.say('must be paid', f'does {who} pay')}?\n"
        f"Solution. Without the discount the price is {count} · {cents / 100:.2f} = {float(full):.2f}. "
        f"{percent} percent of that is {float(saved):.2f}, so {s.say('the bill comes to', 'what remains is')} {float(full - saved):.2f}."
    )


@topic("motion and meeting times")
def motion(s: Sheet) -> str:
    one, two = s.rng.sample(_NAMES, 2)
    v, w, hours = s.number(3, 60), s.number(3, 60), Rational(s.number(2, 20), s.number(2, 5))
    distance, f = (v + w) * hours, s.formula
    return (
        f"{one} and {two} start {f(distance)} kilometres apart and {s.say('travel', 'walk', 'ride')} towards each other at {v} and {w} "
        f"kilometres per hour. {s.say('When do they meet', 'After how long do they meet')}, and where?\n"
        f"Solution. The distance shrinks by {v} + {w} = {v + w} kilometres each hour, so they meet after "
        f"{f(distance)} / {v + w} = {f(hours)} hours. {one} has then covered {f(v * hours)} kilometres and {two} {f(w * hours)}."
    )


@topic("probability of draws from an urn")
def urn(s: Sheet) -> str:
    red, blue, draws, f = s.number(2, 12), s.number(2, 12), s.number(2, 4), s.formula
    hits = s.number(1, min(draws, red))
    ways = sympy.binomial(red, hits) * sympy.binomial(blue, draws - hits)
    total = sympy.binomial(red + blue, draws)
    return (
        f"An urn holds {red} red and {blue} blue balls. {s.say('We draw', 'One takes out')} {draws} {s.say('without replacement', 'at once')}. "
        f"{s.say('What is the chance of', 'How likely are')} exactly {hits} red {'ball' if hits == 1 else 'balls'}?\n"
        f"Solution. There are {f(total)} {s.say('equally likely draws', 'possible selections')}. The red ones can be chosen in "
        f"{sympy.binomial(red, hits)} ways and the blue ones in {sympy.binomial(blue, draws - hits)}, together {ways}. "
        f"{s.say('The probability is', 'Hence it is')} {f(Rational(ways, total))}, about {float(Rational(ways, total)):.4f}. "
        f"The expected number of red balls is {f(Rational(draws * red, red + blue))}."
    )


@topic("division of polynomials")
def long_division(s: Sheet) -> str:
    x, f = s.variable, s.formula
    quotient, divisor, rest = s.polynomial(s.number(1, 2), 6), x + s.number(-6, 6), s.number(-12, 12, zero=True)
    dividend = sympy.expand(quotient * divisor + rest)
    return (
        f"Divide {f(dividend)} by {f(divisor)} {s.say('with remainder', 'and give the remainder')}.\n"
        f"Solution. {s.say('Long division', 'Synthetic division')} gives the quotient {f(quotient)} and the remainder {rest}. "
        f"{s.say('As a check', 'To verify')}, ({f(quotient)}) ({f(divisor)}) = {f(sympy.expand(quotient * divisor))}, "
        f"and adding {rest} gives the dividend. {'The division is exact.' if rest == 0 else 'So the divisor is not a factor.'}"
    )


@topic("complex numbers")
def complex_numbers(s: Sheet) -> str:
    f = s.formula
    z = Integer(s.number(-9, 9)) + s.number(-9, 9) * sympy.I
    w = Integer(s.number(-9, 9)) + s.number(-9, 9) * sympy.I
    size = sympy.expand(w * sympy.conjugate(w))
    return (
        f"{s.say('Given', 'Let')} z = {f(z)} and w = {f(w)}, {s.say('compute', 'find')} z + w, z w and z / w.\n"
        f"Solution. The sum is {f(z + w)}. {s.say('Expanding with', 'Using')} i^2 = -1, z w = {f(sympy.expand(z * w))}. "
        f"For the quotient {s.say('extend by', 'multiply above and below by')} the conjugate {f(sympy.conjugate(w))}: the denominator becomes "
        f"{f(size)} and z / w = {f(sympy.expand(z * sympy.conjugate(w) / size))}. The modulus of z is {f(sympy.Abs(z))}."
    )


@topic("lines and distances in the plane")
def plane(s: Sheet) -> str:
    f, x = s.formula, Symbol("x")
    a, b = s.number(-9, 9, zero=True), s.number(-9, 9, zero=True)
    c, d = a + s.number(1, 9), s.number(-9, 9, zero=True)
    slope = Rational(d - b, c - a)
    return (
        f"{s.say('Which line runs', 'What line passes')} through P({a}, {b}) and Q({c}, {d})? How far apart are the points?\n"
        f"Solution. The slope is ({d} - ({b})) / ({c} - ({a})) = {f(slope)}, so the line is y = {f(slope * x + b - slope * a)}. "
        f"The distance is the square root of {c - a}^2 + ({d - b})^2 = {(c - a) ** 2 + (d - b) ** 2}, that is {f(sympy.sqrt((c - a) ** 2 + (d - b) ** 2))}. "
        f"The midpoint is ({f(Rational(a + c, 2))}, {f(Rational(b + d, 2))})."
    )


@topic("congruences")
def congruence(s: Sheet) -> str:
    m = s.rng.choice((7, 9, 11, 13, 17, 19, 23, 25, 29, 31, 37, 41))
    a = s.number(2, m - 1)
    while sympy.gcd(a, m) != 1:
        a = s.number(2, m - 1)
    b = s.number(1, m - 1)
    inverse = sympy.mod_inverse(a, m)
    e = s.number(3, 60)
    return (
        f"Solve {a} {s.variable} ≡ {b} (mod {m}){s.say(' and find', ', and compute')} the remainder of {a}^{e} on division by {m}.\n"
        f"Solution. {s.say('Since', 'As')} {a} · {inverse} = {a * inverse} ≡ 1, the inverse of {a} is {inverse}. "
        f"{s.say('Multiplying', 'We multiply')} by it{s.say('', ' on both sides')}: {s.variable} ≡ {inverse} · {b} = {inverse * b} ≡ {inverse * b % m}. "
        f"{s.say('By repeated squaring', 'Squaring again and again')}, {a}^{e} ≡ {pow(a, e, m)} (mod {m})."
    )


@topic("extrema of polynomials")
def extrema(s: Sheet) -> str:
    x, f = s.variable, s.formula
    p, q = sorted(s.rng.sample(range(-6, 7), 2))
    k, c = s.number(1, 3), s.number(-9, 9, zero=True)
    slope = sympy.expand(6 * k * (x - p) * (x - q))
    g = sympy.integrate(slope, x) + c
    return (
        f"{s.say('What are the local extrema of', 'Where are the local maximum and minimum of')} g({x}) = {f(g)}?\n"
        f"Solution. The derivative is {f(slope)} = {f(6 * k * (x - p) * (x - q))}, which vanishes at {p} and {q}. "
        f"The second derivative {f(sympy.diff(slope, x))} is {sympy.diff(slope, x).subs(x, p)} at {p}, negative: a maximum with value "
        f"{f(g.subs(x, p))}. At {q} it is {sympy.diff(slope, x).subs(x, q)}, positive: a minimum with value {f(g.subs(x, q))}."
    )
