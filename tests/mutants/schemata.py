"""All mutants of a C++ source in one text: a number set at run time says which of its faults is there (Untch's schemata).

Every barrier and every wait for and commit of asynchronous copies is left out, every comparison, clip, condition, mask and
sign is changed, one at a time. Sites are found by tokens, in text as clang-format leaves it: less-than has spaces around it,
brackets of template arguments have none. What has to be constant when it is compiled stays as it is.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

# Operators that bind more strongly have higher numbers.
PRECEDENCE = {
    "||": 1, "&&": 2, "|": 3, "^": 4, "&": 5, "==": 6, "!=": 6, "<": 7, ">": 7, "<=": 7, ">=": 7, "<<": 8, ">>": 8,
    "+": 9, "-": 9, "*": 10, "/": 10, "%": 10,
}  # fmt: skip
COMPARISONS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
ASSIGNMENTS = ("=", "+=", "-=", "*=", "/=", "|=", "&=", "^=")
CLIPS = ("lower", "higher", "smaller", "larger", "fmaxf", "fminf")  # of two arguments either may be all that is left
LEFT_OUT = ("__syncthreads", "__syncwarp", "set_zero", "commit_async_copies")
TOKEN = re.compile(
    r"[A-Za-z_]\w*|\d[\w.]*(?:e[+-]?\d+f?)?|::|->|\+\+|--|\|\||&&|==|!=|<=|>=|[-+*/|&^]=|(?<= )<<(?= )|(?<= )>>(?= )|\S"
)
BRACKETS = {"(": ")", "[": "]", "{": "}", "<t": "t>"}
CLOSING = tuple(BRACKETS.values())
CONSTANT = re.compile(r"k[A-Z]\w*|[A-Z]\w*|\d+|::|[/*]")  # tokens of a number that is known when it is compiled


@dataclass(frozen=True)
class Token:
    text: str  # brackets of template arguments: "<t" and "t>"
    begin: int
    end: int


@dataclass(frozen=True)
class Fault:
    kind: str
    text: str  # what stands there instead


@dataclass(frozen=True)
class Site:
    begin: int
    end: int
    faults: tuple[Fault, ...]


@dataclass(frozen=True)
class Mutant:
    number: int
    file: str
    line: int
    kind: str
    original: str
    instead: str
    again: int = 1  # how often the same text has occurred in the file by now

    @property
    def name(self) -> str:
        """The same wherever in the file it is."""
        return f"{self.file}: {self.original} -> {self.instead}" + (f" ({self.again})" if self.again > 1 else "")

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.original} -> {self.instead}"


def without_comments(source: str) -> str:
    """Of the same length: spaces for comments, strings and lines for the preprocessor."""
    pattern = r'//[^\n]*|/\*.*?\*/|^[ ]*#[^\n]*|"(?:[^"\\\n]|\\.)*"'
    return re.sub(pattern, lambda m: re.sub(r"[^\n]", " ", m.group()), source, flags=re.DOTALL | re.MULTILINE)


class Source:
    """The tokens of a text, and which of them belong together."""

    def __init__(self, source: str) -> None:
        self.source = without_comments(source)
        self.tokens = self._tokens()
        self.partner: dict[int, int] = {}  # of a bracket
        stack: list[int] = []
        for at, token in enumerate(self.tokens):
            if token.text in BRACKETS:
                stack.append(at)
            elif token.text in CLOSING:
                opened = stack.pop()
                if BRACKETS[self[opened]] != token.text:
                    raise ValueError(f"brackets do not match: {self.source[token.begin - 60 : token.end]}")
                self.partner[opened], self.partner[at] = at, opened
        self.constant = self._constant()

    def __getitem__(self, at: int) -> str:
        return self.tokens[at].text if 0 <= at < len(self.tokens) else ""

    def _tokens(self) -> list[Token]:
        found: list[Token] = []
        depth = 0  # of template arguments
        for match in TOKEN.finditer(self.source):
            text, begin = match.group(), match.start()
            before = self.source[begin - 1 : begin]
            if text == "<" and (not before.isspace() or found[-1].text == "template"):
                text, depth = "<t", depth + 1
            elif text == ">" and depth > 0 and not before.isspace():
                text, depth = "t>", depth - 1
            found.append(Token(text, begin, match.end()))
        return found

    def _constant(self) -> list[bool]:
        """Of each token whether the compiler has to know its value: template arguments, constexpr, types."""
        result: list[bool] = []
        stack = [False]  # of the brackets around
        statement = template = False  # of the statement that is read
        begins = True
        for at, token in enumerate(self.tokens):
            if begins:
                words = [self[at], self[at + 1], self[at + 2]]
                words = words[: words.index("{")] if "{" in words else words
                template = token.text == "template"
                statement = token.text != "if" and bool({"constexpr", "static_assert", "using"} & set(words))
            begins = False
            result.append(stack[-1] or statement or template)
            if token.text == "{":
                stack.append(stack[-1] or statement)
                begins = True
            elif token.text in BRACKETS:
                constant = token.text == "<t" or self[at - 1] in ("constexpr", "__launch_bounds__", "decltype")
                stack.append(result[-1] or constant)
            elif token.text in CLOSING:
                stack.pop()
                begins = token.text == "}"
            elif token.text == ";" or (token.text == ":" and self[at - 1] in ("private", "public")):
                begins = True
        return result

    def text(self, first: int, last: int) -> str:
        """On one line."""
        return " ".join(self.source[self.tokens[first].begin : self.tokens[last].end].split())

    def is_binary(self, at: int) -> bool:
        if not 0 <= at < len(self.tokens):
            return False
        begin, end = self.tokens[at].begin, self.tokens[at].end
        return self[at] in PRECEDENCE and self.source[begin - 1].isspace() and self.source[end].isspace()

    def is_unary_minus(self, at: int) -> bool:
        before = self[at - 1]
        after_operand = before in (")", "]", "}") or (re.match(r"\w", before) is not None and before != "return")
        return self[at] == "-" and not self.is_binary(at) and not after_operand

    def first_of_left(self, at: int, precedence: int) -> int:
        """The first token of the operand before `at`: of operators that bind as strongly as `precedence` or more."""
        while at > 0:
            before = self[at - 1]
            if before in (")", "else") and re.match(r"\w", self[at]):
                break  # a statement after `for (...)`
            weaker = self.is_binary(at - 1) and PRECEDENCE[before] < precedence
            if weaker or before in (*BRACKETS, *ASSIGNMENTS, ",", ";", "?", ":", "}", "return"):
                break
            at = self.partner[at - 1] if before in CLOSING else at - 1
        return at

    def last_of_right(self, at: int, precedence: int, ternary: bool = False) -> int:
        """The last token of the operand after `at`: of operators that bind more strongly than `precedence`."""
        while True:
            after = self[at + 1]
            if after == "?" and ternary:
                at = self.colon(at + 1)
                continue
            weaker = self.is_binary(at + 1) and PRECEDENCE[after] <= precedence
            if weaker or after in (*CLOSING, ",", ";", "?", ":", ""):
                return at
            at = self.partner[at + 1] if after in BRACKETS else at + 1

    def colon(self, question: int) -> int:
        """The colon of a question mark."""
        at, depth = question + 1, 0
        while self[at] != ":" or depth > 0:
            depth += (self[at] == "?") - (self[at] == ":")
            at = self.partner[at] + 1 if self[at] in BRACKETS else at + 1
        return at

    def arguments(self, opened: int) -> list[str]:
        """The text of each argument in a pair of brackets."""
        result, first, at = [], opened + 1, opened + 1
        while at < self.partner[opened]:
            if self[at] == ",":
                result.append(self.text(first, at - 1))
                first = at + 1
            at = self.partner[at] + 1 if self[at] in BRACKETS else at + 1
        return [*result, self.text(first, at - 1)] if at > first else result

    def in_for(self, at: int) -> bool:
        """Whether in the brackets of a `for`."""
        while at > 0:
            if self[at] in CLOSING:
                at = self.partner[at]
            elif self[at] in BRACKETS:
                return self[at] == "(" and self[at - 1] == "for"
            at -= 1
        return False

    def sites(self) -> Iterator[Site]:
        for at, token in enumerate(self.tokens):
            if self.constant[at]:
                continue
            if re.match(r"[A-Za-z_]", token.text):
                yield from self._calls(at)
            elif self.is_binary(at):
                yield from self._operators(at)
            elif self.is_unary_minus(at):
                last = self.last_of_right(at, 11)
                yield self._site(at, last, Fault("sign", self.text(at + 1, last)))
            elif token.text == "?":
                first, colon = self.first_of_left(at, 0), self.colon(at)
                last = self.last_of_right(colon, 0, ternary=True)
                then = Fault("choice", self.text(at + 1, colon - 1))
                yield self._site(first, last, then, Fault("choice", self.text(colon + 1, last)))
            elif token.text in ("+=", "-=", "*=") and not self.in_for(at):
                first, last = self.first_of_left(at, 0), self.last_of_right(at, 0, ternary=True)
                left, right = self.text(first, at - 1), self.text(at + 1, last)
                instead = {"+=": f"{left} -= {right}", "-=": f"{left} += {right}", "*=": left}[token.text]
                yield self._site(first, last, Fault("sign" if token.text != "*=" else "factor", instead))

    def _site(self, first: int, last: int, *faults: Fault) -> Site:
        return Site(self.tokens[first].begin, self.tokens[last].end, faults)

    def _calls(self, at: int) -> Iterator[Site]:
        name = self[at]
        if name == "wait_async_copies":
            opened = at + 1
            last = self.partner[self.partner[opened] + 1]
            one_less = f"ptx::wait_async_copies<({self.text(opened + 1, self.partner[opened] - 1)}) + 1>()"
            yield self._site(at - 2, last, Fault("wait", "(void)0"), Fault("wait", one_less))
            return
        if self[at + 1] != "(" or (re.match(r"\w", self[at - 1]) and self[at - 1] not in ("return", "else")):
            return  # no call, or a declaration
        last = self.partner[at + 1]
        first = at - 2 if self[at - 1] == "::" else at
        arguments = self.arguments(at + 1)
        if name in LEFT_OUT:
            kind = {"set_zero": "zero", "commit_async_copies": "commit"}.get(name, "barrier")
            yield self._site(first, last, Fault(kind, "(void)0"))
        elif name == "__syncthreads_or":
            yield self._site(first, last, Fault("barrier", f"({arguments[0]}) != 0"))
        elif name in CLIPS:
            yield self._site(first, last, *(Fault("clip", argument) for argument in arguments))
        elif name == "clamp":
            x, low, high = (f"int64_t({argument})" for argument in arguments)
            below, above = f"{x} < {low} ? {low} : {x}", f"{x} > {high} ? {high} : {x}"
            yield self._site(first, last, Fault("clip", x), Fault("clip", below), Fault("clip", above))
        elif (
            name == "if"
            and not {"=", ";"} & {self[i] for i in range(at, last)}
            and self[last + 1] != "__builtin_unreachable"
        ):
            yield self._site(at + 2, last - 1, Fault("condition", "true"), Fault("condition", "false"))

    def _operators(self, at: int) -> Iterator[Site]:
        operator = self[at]
        precedence = PRECEDENCE[operator]
        first, last = self.first_of_left(at, precedence), self.last_of_right(at, precedence)
        left, right = self.text(first, at - 1), self.text(at + 1, last)
        if operator in COMPARISONS:
            if self.in_for(at) and all(CONSTANT.fullmatch(self[i]) for i in range(at + 1, last + 1)):
                return  # a loop that is unrolled
            yield self._site(first, last, Fault("comparison", f"{left} {COMPARISONS[operator]} {right}"))
        elif operator in ("&&", "||"):
            yield self._site(first, last, Fault("mask", left), Fault("mask", right))
        elif operator == "-":
            yield self._site(first, last, Fault("sign", f"{left} + {right}"))


def schemata(source: str, file: str, first_number: int, added: Sequence[Site] = ()) -> tuple[str, list[Mutant]]:
    """The text with all its mutants, and what is `added`, which asks `lak_mutant(number)` whether one is there; the mutants.

    Raises:
        ValueError: where the text is not understood.
    """
    merged: dict[tuple[int, int], tuple[Fault, ...]] = {}
    parsed = Source(source)
    for site in (*parsed.sites(), *added):
        merged[site.begin, site.end] = merged.get((site.begin, site.end), ()) + site.faults
    order = sorted(merged, key=lambda span: (span[0], -span[1]))
    mutants: list[Mutant] = []
    seen: Counter[tuple[str, str]] = Counter()

    def text(begin: int, end: int, spans: list[tuple[int, int]]) -> str:
        result, at = "", begin
        while spans:
            span = spans.pop(0)
            inner = []
            while spans and spans[0][0] < span[1]:
                inner.append(spans.pop(0))
            if any(one > span[1] for _, one in inner) or span[1] > end:
                raise ValueError(f"{file}: sites overlap: {source[span[0] : span[1]]}")
            line = source.count("\n", 0, span[0]) + 1
            original = " ".join(parsed.source[span[0] : span[1]].split())
            choices = ""
            as_bool = (
                "bool" if {fault.kind for fault in merged[span]} & {"condition", "mask"} else ""
            )  # of pointers, too
            for fault in merged[span]:
                seen[original, fault.text] += 1
                again, number = seen[original, fault.text], first_number + len(mutants)
                mutants.append(Mutant(number, file, line, fault.kind, original, fault.text, again))
                choices += f"lak_mutant({mutants[-1].number}) ? {as_bool}({fault.text}) : "
            result += source[at : span[0]] + f"({choices}{as_bool}({text(*span, inner)}))"
            at = span[1]
        return result + source[at:end]

    changed = text(0, len(source), order)
    return changed, mutants
