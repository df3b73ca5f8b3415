"""Formulas of the pages as MathML, which browsers draw themselves: no script, no font, no other host.

It knows the part of LaTeX that docs/theory.md uses. An unknown command is an error, so that a page never shows one as it is.
"""

import re
from dataclasses import dataclass
from html import escape
from xml.etree import ElementTree

from markdown import Extension, Markdown
from markdown.inlinepatterns import InlineProcessor


def _pairs(text: str) -> dict[str, str]:
    words = text.split()
    return dict(zip(words[::2], words[1::2], strict=True))


LETTERS = _pairs("""
    alpha α beta β gamma γ delta δ epsilon ε eta η theta θ kappa κ lambda λ mu μ nu ν pi π rho ρ sigma σ tau τ varphi φ
    phi ϕ psi ψ omega ω ell ℓ partial ∂ infty ∞ nabla ∇ Delta Δ Theta Θ Lambda Λ Sigma Σ Phi Φ Psi Ψ Omega Ω top ⊤ bot ⊥
""")
SIGNS = _pairs("""
    cdot ⋅ times × ge ≥ le ≤ ne ≠ approx ≈ sim ∼ propto ∝ to → leftarrow ← mapsto ↦ otimes ⊗ oplus ⊕ odot ⊙ circ ∘ ast ∗
    in ∈ subset ⊂ cup ∪ cap ∩ pm ± ldots … cdots ⋯ mid ∣ setminus ∖
""")
FENCES = {"lVert": "‖", "rVert": "‖", "lvert": "|", "rvert": "|", "langle": "⟨", "rangle": "⟩", "{": "{", "}": "}"}
LARGE = {"sum": "∑", "prod": "∏", "int": "∫"}
LIMITS = {"min", "max", "sup", "inf"}
NAMES = {"log", "exp", "arg", "det", "tr"}
ACCENTS = {"tilde": "~", "bar": "¯", "hat": "^", "overline": "¯"}
SPACES = {"quad": "1em", "qquad": "2em", ",": "0.17em", ";": "0.28em", ":": "0.22em", "!": "-0.17em", " ": "0.25em"}
TOKEN = re.compile(r"\\(?:[a-zA-Z]+|.)|\d+(?:\.\d+)?|[^\s]", re.DOTALL)


class UnknownCommand(Exception):
    """A formula holds what this module cannot write as MathML."""


@dataclass
class Formula:
    """The tokens of a formula, read from the left."""

    source: str

    def __post_init__(self) -> None:
        self.tokens, self.at = TOKEN.findall(self.source), 0

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self) -> str:
        self.at += 1
        if self.at > len(self.tokens):
            raise UnknownCommand(f"the formula ends too early: {self.source!r}")
        return self.tokens[self.at - 1]

    def row(self, *ends: str) -> str:
        parts = []
        while self.peek() not in ends:
            parts.append(self.scripted())
        return "".join(parts)

    def argument(self) -> str:
        if self.peek() != "{":
            return self.atom()[0]
        self.take()
        inner = self.row("}")
        self.take()
        return f"<mrow>{inner}</mrow>"

    def words(self) -> str:
        """The letters of an argument such as that of mathrm."""
        if self.take() != "{":
            raise UnknownCommand(f"braces are missing in {self.source!r}")
        found = []
        while (token := self.take()) != "}":
            found.append(" " if token in ("\\ ", "~") else token)
        return "".join(found)

    def scripted(self) -> str:
        """An atom with what stands below and above it."""
        base, limits = self.atom()
        low = high = primes = ""
        while self.peek() in ("_", "^", "'"):
            mark = self.take()
            if mark == "'":
                primes += "′"
            elif mark == "_":
                low = self.argument()
            else:
                high = self.argument()
        if primes:  # the sign is raised by itself
            signs = {"′": "′", "′′": "″", "′′′": "‴"}[primes]
            base = f'<mrow>{base}<mo lspace="0" rspace="0">{signs}</mo></mrow>'
        if not low and not high:
            return base
        kind = ("munder", "mover", "munderover") if limits else ("msub", "msup", "msubsup")
        tag = kind[2] if low and high else kind[0] if low else kind[1]
        return f"<{tag}>{base}{low}{high}</{tag}>"

    def atom(self) -> tuple[str, bool]:
        """The next thing, and whether its scripts stand below and above it."""
        token = self.take()
        if token == "{":
            inner = self.row("}")
            self.take()
            return f"<mrow>{inner}</mrow>", False
        if token.startswith("\\"):
            return self.command(token[1:])
        if token[0].isdigit():
            return f"<mn>{token}</mn>", False
        if token[0].isalpha():
            return f"<mi>{token}</mi>", False
        if token == "~":
            return '<mspace width="0.25em"/>', False
        return _sign("−" if token == "-" else token), False

    def command(self, name: str) -> tuple[str, bool]:
        if name in LETTERS:
            return f"<mi>{LETTERS[name]}</mi>", False
        if name in SIGNS:
            return _sign(SIGNS[name]), False
        if name in FENCES:
            return _sign(FENCES[name]), False
        if name in LARGE:
            return f"<mo>{LARGE[name]}</mo>", name != "int"
        if name in LIMITS:
            return f'<mo movablelimits="true" lspace="0.17em" rspace="0.17em">{name}</mo>', True
        if name in NAMES:
            return f'<mi>{name}</mi><mspace width="0.12em"/>', False
        if name in SPACES:
            return f'<mspace width="{SPACES[name]}"/>', False
        if name in ("mathrm", "text", "operatorname"):
            tag = "mi" if name == "operatorname" else "mtext"
            return f'<{tag} mathvariant="normal">{escape(self.words())}</{tag}>', False
        if name == "mathcal":
            return f"<mi>{''.join(map(_script, self.words()))}</mi>", False
        if name in ACCENTS:
            inner, stretchy = self.argument(), str(name == "overline").lower()
            return f'<mover accent="true">{inner}<mo stretchy="{stretchy}">{ACCENTS[name]}</mo></mover>', False
        if name == "frac":
            return f"<mfrac>{self.argument()}{self.argument()}</mfrac>", False
        if name == "sqrt":
            return f"<msqrt>{self.argument()}</msqrt>", False
        if name == "left":
            return self.between(), False
        raise UnknownCommand(f"\\{name} is unknown to docs/site/site_math.py: {self.source!r}")

    def between(self) -> str:
        """What stands between left and right, and the fences, as high as it."""
        first = self.fence()
        inner = self.row("\\right")
        self.take()
        before, after = (f'<mo fence="true" stretchy="true">{sign}</mo>' for sign in (first, self.fence()))
        return f"<mrow>{before}{inner}{after}</mrow>"

    def fence(self) -> str:
        token = self.take()
        return FENCES[token[1:]] if token.startswith("\\") else "" if token == "." else escape(token)


def _sign(sign: str) -> str:
    if sign in "()[]{}‖|⟨⟩":
        return f'<mo stretchy="false" lspace="0" rspace="0">{sign}</mo>'
    if sign == "/":
        return '<mo lspace="0.05em" rspace="0.05em">/</mo>'
    if sign in ".;":
        return f'<mo lspace="0" rspace="0.17em" separator="true">{sign}</mo>'
    return f"<mo>{escape(sign)}</mo>"


def _script(letter: str) -> str:
    special = {"B": "ℬ", "E": "ℰ", "F": "ℱ", "H": "ℋ", "I": "ℐ", "L": "ℒ", "M": "ℳ", "R": "ℛ"}
    return special.get(letter) or chr(0x1D49C + ord(letter) - ord("A"))


def mathml(source: str, *, display: bool = False) -> str:
    """The MathML of a formula between dollar signs."""
    kind = ' display="block"' if display else ""
    made = f"<math{kind}><mrow>{Formula(source.strip()).row('')}</mrow></math>"
    ElementTree.fromstring(made)
    return made


class _Between(InlineProcessor):
    """Formulas between dollar signs, on a line of their own between two."""

    def handleMatch(self, m: re.Match[str], data: str) -> tuple[str, int, int]:  # type: ignore[override]
        made = mathml(m["display"] or m["inline"], display=m["display"] is not None)
        return self.md.htmlStash.store(made), m.start(0), m.end(0)


class Formulas(Extension):
    """$x$ and $$x$$ in Markdown."""

    def extendMarkdown(self, md: Markdown) -> None:
        pattern = r"\$\$(?P<display>.+?)\$\$|(?<![\\$])\$(?P<inline>[^\s$](?:[^$]*[^\s$])?)\$(?![\d$])"
        # After code (190), so that dollars in code stay, and before escapes (180), so that backslashes are ours.
        md.inlinePatterns.register(_Between(pattern, md), "formulas", 185)
