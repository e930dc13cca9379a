"""Tokens -> tree, lower half of the grammar: numbers, letters, brackets and commands with their arguments."""

from __future__ import annotations

from abc import ABC, abstractmethod
from fractions import Fraction

from oreal_megatron.math_equality import tree
from oreal_megatron.math_equality.lexer import ParseError, Token
from oreal_megatron.math_equality.tree import Node

MAX_DEPTH = 50  # of brackets and commands within each other
END = Token("end of text", "")
FACTOR = frozenset(("num", "rep", "atom", "const", "fn", "big", "frac", "sqrt", "ordered", "open", "begin"))
_APPLIED = frozenset(("f", "g", "h", "F", "G", "P", "Q", "\\phi", "\\Phi", "\\varphi", "\\psi"))
_MATRICES = frozenset(("pmatrix", "bmatrix", "matrix", "Bmatrix", "array", "vmatrix", "smallmatrix"))
_MINUS_ONE = ("neg", ("num", Fraction(1), None))


class Primaries(ABC):
    """A cursor over tokens, and the operands that begin at it. parser.py defines the abstract levels above them."""

    def __init__(self, tokens: list[Token]) -> None:
        self.tokens, self.at, self.depth, self.bars = tokens, 0, 0, 0

    # -- levels of the grammar above, which brackets and commands hold ---------------------------------------------
    @abstractmethod
    def answer(self) -> Node:
        """Parse items separated by commas, semicolons, "and", "or"."""

    @abstractmethod
    def sum(self) -> Node:
        """Parse terms and the signs between them."""

    @abstractmethod
    def term(self) -> Node:
        """Parse a product or quotient with its unit."""

    @abstractmethod
    def factor(self, signs: bool = False) -> Node:
        """Parse an operand with its powers; `signs`: with the signs before it."""

    # -- the cursor --------------------------------------------------------------------------------------------------
    def peek(self, ahead: int = 0) -> Token:
        """Return the token `ahead` of the cursor, END behind the last."""
        return self.tokens[self.at + ahead] if self.at + ahead < len(self.tokens) else END

    def advance(self) -> Token:
        """Return the next token and step past it. Only where a token is known to be next."""
        self.at += 1
        return self.tokens[self.at - 1]

    def take(self, kind: str | None = None, value: str | None = None) -> Token | None:
        """Return the next token and step past it if it is of this kind and value, else None."""
        token = self.peek()
        if token is END or kind is not None and token.kind != kind or value is not None and token.value != value:
            return None
        self.at += 1
        return token

    def expect(self, kind: str, value: str) -> None:
        """Step past a token that must be next."""
        if self.take(kind, value) is None:
            raise ParseError(f"expected {value!r}, got {self.peek().value!r}")

    # -- operands ----------------------------------------------------------------------------------------------------
    def primary(self) -> Node:
        """Parse one operand, without its powers."""
        token = self.take()
        if token is None:
            raise ParseError("the text ends where a number is expected")
        if token.kind in ("num", "rep"):
            return tree.number(token.value) if token.kind == "num" else tree.repeating(token.value)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ParseError(f"more than {MAX_DEPTH} brackets or commands stand within each other")
        node = self.compound(token)
        self.depth -= 1
        return node

    def compound(self, token: Token) -> Node:
        """Parse an operand that is no number: a letter, a command or a bracket."""
        if token.kind in ("atom", "const"):
            return self.applied((token.kind, token.value))
        handler = {"frac": self.fraction, "sqrt": self.root, "fn": self.function, "big": self.big, "begin": self.matrix}
        if token.kind in handler:
            return handler[token.kind](token.value)
        if token.kind == "ordered":
            mark, letters = token.value.split(" ")
            return ("fn", mark, (("word", letters),))
        if token.kind == "open":
            self.at -= 1
            return self.group()
        if token == ("op", "|"):
            return self.absolute()
        raise ParseError(f"unexpected {token.value!r}")

    def argument(self, digit: bool = False) -> Node:
        r"""Parse the argument of a command or ^: a group, or one token (one digit of it after \frac)."""
        token = self.peek()
        if token == ("open", "{"):
            return self.primary()
        if token.kind == "num" and digit and len(token.value) > 1:
            self.tokens[self.at] = Token("num", token.value[1:])
            return tree.number(token.value[0])
        if token.kind == "op" and token.value in ("+", "-"):
            return self.factor(signs=True)
        return self.primary()

    def applied(self, node: Node) -> Node:
        """Parse the arguments behind a letter, Phi(x, y) or f(2); return the letter where none follow.

        Arguments are a list in brackets behind any letter, or any brackets behind a usual function letter.
        """
        if self.peek() != ("open", "(") or node[0] != "atom" or not (node[1] in _APPLIED or self.lists_ahead()):
            return node
        inside = self.group()
        if inside[0] == "tuple" and inside[1:3] != ("(", ")"):
            raise ParseError("the argument of a function is an interval")
        args = inside[3] if inside[0] == "tuple" else (inside,)
        if node[1] == "C" and [arg[0] for arg in args] == ["num", "num"]:
            return ("fn", "binom", args)
        return ("fn", node[1], args)

    def lists_ahead(self) -> bool:
        """Return whether the bracket ahead holds a comma of its own, without parsing it twice."""
        level = 0
        for token in self.tokens[self.at :]:
            level += (token.kind == "open") - (token.kind == "close")
            if level == 0:
                return False
            if level == 1 and token.kind == "sep":
                return True
        return False

    def fraction(self, kind: str) -> Node:
        r"""Parse the arguments of \frac or \binom."""
        top = self.argument(digit=True)
        bottom = self.argument(digit=True)
        return tree.quotient(top, bottom) if kind == "/" else ("fn", "binom", (top, bottom))

    def root(self, _: str) -> Node:
        r"""Parse the arguments of \sqrt."""
        if self.take("open", "[") is None:
            return ("fn", "sqrt", (self.argument(),))
        degree = self.sum()
        self.expect("close", "]")
        return ("fn", "root", (self.argument(), degree))

    def function(self, name: str) -> Node:
        """Parse sin^2 x, log_2 8, max(a, b), cos 2x: without brackets the argument is the product that follows."""
        if self.peek().kind in ("close", "end of text"):
            return ("atom", name)
        scripts = self.scripts()
        power = scripts.get("^")
        if self.peek().kind == "open":
            inside = self.group()
            if inside[0] == "tuple" and inside[1:3] not in (("(", ")"), ("[", "]")):
                raise ParseError("the argument of a function is an interval")
            args = inside[3] if inside[0] == "tuple" else inside[1] if inside[0] == "set" else (inside,)
            if inside[0] not in ("tuple", "set") and power is None and self.take("op", "^") is not None:
                power = self.argument()
        else:
            args = (self.bare_argument(),)
        if power == _MINUS_ONE and name in ("sin", "cos", "tan"):
            return ("fn", "arc" + name, args)
        node = ("fn", name, args + ((scripts["_"],) if "_" in scripts else ()))
        return node if power is None else ("pow", node, power)

    def scripts(self) -> dict[str, Node]:
        """Parse the arguments of ^ and _ behind a command."""
        arguments: dict[str, Node] = {}
        while self.peek() in (("op", "^"), ("op", "_")):
            sign = self.advance().value
            arguments[sign] = self.argument()
        return arguments

    def bare_argument(self) -> Node:
        r"""Parse factors up to the next function, sign or bracket: \sin 2x \cos y is sin(2x) cos(y)."""
        node = self.factor(signs=True)
        while self.peek().kind in ("num", "atom", "const", "frac", "sqrt"):
            node = tree.times(node, self.factor())
        if self.peek() == ("op", "/") and self.peek(1).kind in ("num", "atom"):
            self.take()
            return ("div", node, self.factor())
        return node

    def big(self, name: str) -> Node:
        """Parse a sum, product, integral or limit: its bounds and the term that follows."""
        bounds = self.scripts()
        return ("fn", name, (self.term(), bounds.get("_", ("word", "")), bounds.get("^", ("word", ""))))

    def absolute(self) -> Node:
        """Parse an absolute value behind its first bar."""
        self.bars += 1
        inside = self.answer()
        self.expect("op", "|")
        self.bars -= 1
        return ("fn", "abs", (tree.length(inside),))

    def matrix(self, name: str) -> Node:
        """Parse the rows of a matrix environment."""
        if name not in _MATRICES:
            raise ParseError(f"the environment {name} is unknown")
        rows: list[list[Node]] = [[]]
        while self.take("end") is None:
            if self.take("op", "\\\\") is not None:
                rows.append([])
            elif self.take("op", "&") is None:
                rows[-1].append(self.answer())
        node = ("matrix", tuple(tuple(row) for row in rows if row))
        return ("fn", "det", (node,)) if name == "vmatrix" else node

    def colon_of_builder(self) -> None:
        """Turn the colon of {x in R : x > 3}, the first behind "in", into the bar of a set builder."""
        member = False
        for at in range(self.at, len(self.tokens)):
            token = self.tokens[at]
            member |= token == ("rel", "in")
            if token == ("op", ":") and member:
                self.tokens[at] = Token("op", "|")
            if token in (("op", ":"), ("op", "|"), ("close", "set")):
                return

    def group(self) -> Node:
        """Parse brackets of every kind."""
        opening, bars = self.advance().value, self.bars
        self.bars = 0
        if opening == "set":
            self.colon_of_builder()
        inside: Node | None
        builder = opening in ("set", "{") and self.peek().kind == "atom" and self.peek(1) in (("op", "|"), ("op", ":"))
        if builder:
            variable = self.advance()
            self.advance()
            inside = ("such", ("atom", variable.value), self.answer())
        else:
            inside = None if self.peek().kind == "close" else self.answer()
            if inside is not None and opening in ("set", "{") and self.take("op", "|") is not None:
                inside, builder = ("such", inside, self.answer()), True  # {x in R | ...}
        closing = self.take("close")
        self.bars = bars
        if closing is None:
            raise ParseError(f"expected a closing bracket, got {self.peek().value!r}")
        node = tree.bracket(opening, closing.value, inside)
        return inside if builder and inside is not None else node
