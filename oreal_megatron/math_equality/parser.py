"""Tokens -> tree, upper half of the grammar: lists, relations, ratios, unions, sums, products, powers."""

from __future__ import annotations

from fractions import Fraction

from oreal_megatron.math_equality import tree
from oreal_megatron.math_equality.lexer import ParseError, tokens
from oreal_megatron.math_equality.primaries import END, FACTOR, Primaries
from oreal_megatron.math_equality.tree import Node

MAX_POSTFIX = 8  # exponents, factorials and primes behind one operand
_SIGNS = frozenset(("+", "-", "pm", "mp"))
_PRODUCTS = (("op", "*"), ("op", "/"), ("op", "cross"), ("mod", "mod"), ("mod", "bmod"))


def parse(text: str, thousands: bool = True) -> Node:
    """Parse a normalised answer. `thousands`: 1,000 is one number. Raises ParseError."""
    parser = _Parser(tokens(text, thousands))
    node = parser.answer()
    if parser.peek() is not END:
        raise ParseError(f"unexpected {parser.peek().value!r}")
    if tree.depth(node) > tree.MAX_TREE_DEPTH:
        raise ParseError(f"the tree has more than {tree.MAX_TREE_DEPTH} levels")
    return node


class _Parser(Primaries):
    """Recursive descent, one method per level of binding."""

    def answer(self) -> Node:
        """Parse items separated by commas, semicolons, "and", "or"."""
        items, separators = [self.item()], []
        while (separator := self.take("sep")) is not None:
            while (more := self.take("sep")) is not None:
                separator = more  # ", and"
            if self.peek().kind in ("close", "end of text"):
                break
            separators.append(separator.value)
            items.append(self.item())
        return items[0] if len(items) == 1 else tree.grouped(items, separators)

    def item(self) -> Node:
        """Parse a chain of relations, or words."""
        if self.peek().kind == "word":
            words = self.words()
            if self.take("rel", "=") is None:
                return words
            return ("rel", (words, self.ratio()), ("=",))  # Area = 540
        while self.depth == 0 and self.peek() in (("rel", "=>"), ("rel", "="), ("rel", "~")):
            self.take()
        items, ops = [self.ratio()], []
        while (relation := self.take("rel")) is not None:
            ops.append(relation.value)
            items.append(self.ratio() if self.peek().kind != "word" else self.words())
        node = items[0] if not ops else ("rel", tuple(items), tuple(ops))
        if ops and items[-1][:2] == ("fn", "mod"):  # n = 1 mod 4 is n = 1 (mod 4)
            value, modulus = items.pop()[2]
            return ("rel", (("rel", (*items, value), tuple(ops)), modulus), ("mod",))
        return node if self.take("mod") is None else ("rel", (node, self.ratio()), ("mod",))

    def words(self) -> Node:
        """Parse words up to the next separator, as one text."""
        words = []
        while self.peek().kind not in ("sep", "close", "rel", "end of text"):
            words.append(self.advance().value)
        return ("word", " ".join(words))

    def ratio(self) -> Node:
        """Parse 2:3:4, or one union."""
        items = [self.union()]
        while self.peek() == ("op", ":") and self.peek(1).kind in FACTOR | {"op"}:
            self.take()
            items.append(self.union())
        return items[0] if len(items) == 1 else ("ratio", tuple(items))

    def union(self) -> Node:
        """Parse sums joined by union, intersection or set difference."""
        node = self.sum()
        while self.peek() in (("op", "cup"), ("op", "cap"), ("op", "setminus")):
            op, right = self.advance().value, self.sum()
            if op == "cup":
                node = ("union", (node[1] if node[0] == "union" else (node,)) + (right,))
            else:
                node = ("minus" if op == "setminus" else "meet", node, right)
        return node

    def sum(self) -> Node:
        """Parse terms and the signs between them."""
        terms = [self.signed()]
        while self.peek().kind == "op" and self.peek().value in _SIGNS:
            terms.append(self.signed())
        return terms[0] if len(terms) == 1 else ("add", tuple(terms))

    def signed(self) -> Node:
        """Parse a term with its signs."""
        negative, plus_minus = False, None
        while self.peek().kind == "op" and self.peek().value in _SIGNS:
            sign = self.advance().value
            negative ^= sign == "-"
            plus_minus = sign if sign in ("pm", "mp") else plus_minus
        node = self.term()
        if negative:
            node = ("neg", node)
        return node if plus_minus is None else ("pm", plus_minus, node)

    def term(self) -> Node:
        """Parse products and quotients from the left, and the unit behind them.

        Next to a letter, juxtaposition binds more than "/": x/yz is x/(yz).
        """
        if (money := self.take("money")) is not None:
            return ("unit", self.signed(), money.value)
        node = self.product()
        while self.peek() in _PRODUCTS:
            operator = self.advance().value
            if operator != "/":
                combine = {"*": tree.times, "cross": tree.cross}.get(operator, tree.remainder)
                node = combine(node, self.product(signs=True))
                continue
            bottom = self.factor(signs=True)
            if bottom[0] != "num" and self.follows():
                bottom = tree.times(bottom, self.product())
            node = tree.quotient(node, bottom)
            if self.follows():
                node = tree.times(node, self.product())
        return self.unit(node)

    def follows(self) -> bool:
        """Return whether a factor is next, without a sign before it."""
        return self.peek().kind in FACTOR or self.at_bar()

    def at_bar(self) -> bool:
        """Return whether a bar is next that opens an absolute value: none is open, and another bar follows."""
        return self.peek() == ("op", "|") and self.bars == 0 and ("op", "|") in self.tokens[self.at + 1 :]

    def product(self, signs: bool = False) -> Node:
        r"""Parse factors next to each other; 1\frac{1}{2} is a mixed number."""
        bare, factors = self.peek().kind == "num", [self.factor(signs)]
        while self.follows():
            token = self.peek()
            if bare and token.kind == "num" and factors[-1][0] == "num":
                factors[-1] = self.mixed(factors[-1])
                continue
            following = self.factor()
            if bare and token == ("frac", "/"):
                following = tree.mixed(factors, following)
            factors.append(following)
            bare = token.kind == "num"
        return factors[0] if len(factors) == 1 else ("mul", tuple(factors))

    def mixed(self, integer: Node) -> Node:
        """Parse the fraction of 3 1/2. Two numbers next to each other mean nothing else."""
        top, slash, bottom = self.peek(), self.peek(1), self.peek(2)
        plain = top.value.isdigit() and bottom.value.isdigit() and integer[1].denominator == 1
        if slash != ("op", "/") or bottom.kind != "num" or not plain or int(bottom.value) <= int(top.value):
            raise ParseError(f"two numbers stand next to each other, the second is {top.value[:20]}")
        self.at += 3
        return ("add", (integer, ("num", Fraction(int(top.value), int(bottom.value)), None)))

    def unit(self, node: Node) -> Node:
        """Parse the words behind a number, with their exponent: 15 cm^2, 12 square units, 60 miles per hour."""
        words: list[str] = []
        while self.peek().kind in ("word", "money"):
            words.append(self.advance().value)
            if words[0] in ("base", "in base") and (base := self.take("num")) is not None:
                return tree.subscript(node, tree.number(base.value))
            if self.peek() in (("op", "^"), ("op", "/")):
                words.append(self.advance().value + self.unit_part())
            if self.peek() == ("op", "*") and self.peek(1).kind == "word":
                self.take()  # N m
        return ("unit", node, " ".join(words)) if words else node

    def unit_part(self) -> str:
        """Parse the exponent or divisor of a unit."""
        braces = self.take("open", "{") is not None
        token = self.take()
        if token is None or token.kind not in ("num", "word", "atom"):
            raise ParseError("the exponent or divisor of a unit is neither a number nor a word")
        if braces:
            self.expect("close", "}")
        return token.value

    def factor(self, signs: bool = False) -> Node:
        """Parse an operand with its powers; `signs`: with the signs before it."""
        negative = False
        while signs and self.peek().kind == "op" and self.peek().value in ("+", "-"):
            negative ^= self.advance().value == "-"
        node = self.postfix(self.primary())
        return ("neg", node) if negative else node

    def postfix(self, node: Node) -> Node:
        """Parse subscripts, powers, factorials, degree and percent signs behind an operand."""
        for _ in range(MAX_POSTFIX):
            token = self.peek()
            if token.kind == "deg":
                self.take()
                node = ("deg", node)
            elif token == ("op", "^"):
                self.take()
                node = ("pow", node, self.exponent())
            elif token == ("op", "_"):
                self.take()
                node = tree.subscript(node, self.argument())
            elif token.kind == "op" and token.value in ("!", "!!", "%", "'"):
                self.take()
                node = ("pct", node) if token.value == "%" else ("fn", token.value, (node,))
            else:
                return node
        raise ParseError(f"more than {MAX_POSTFIX} exponents or signs stand behind one operand")

    def exponent(self) -> Node:
        """Parse an exponent. Powers of powers bind from the right: 2^3^2 is 2^9."""
        levels = [self.argument()]
        while self.take("op", "^") is not None:
            levels.append(self.argument())
        node = levels.pop()
        while levels:
            node = ("pow", levels.pop(), node)
        return node
