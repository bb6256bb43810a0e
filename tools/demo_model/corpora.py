"""Turn unpacked Debian packages into four plain-text corpora, one a domain.

    python corpora.py PACKAGES OUTPUT

PACKAGES holds one folder per unpacked package. OUTPUT gets, for every domain, `<domain>.train.jsonl` and
`<domain>.heldout.jsonl`: one JSON string per line, each a document of at most about 1,500 characters.
The split is by source file (for Metamath by blocks of consecutive statements), so that a held-out document never
continues a training document.
"""
import gzip
import html.parser
import json
import pathlib
import random
import re
import sys

SPLIT_SEED = 20240312
DOCUMENT_CHARACTERS = 1500
HELD_OUT_SHARE = 0.04
DOMAINS = ("english", "german", "python", "metamath")

GERMAN_WORDS = set("der die das und ist nicht ein eine einen mit von für auf wird werden zu den dem des im sich auch "
                   "oder als es wenn sie dass kann an aus bei nach wie nur sind ich".split())
ENGLISH_WORDS = set("the of and to is that in it for are this with be not as on which by or have from was they can "
                    "if you an at but we their will has".split())


def is_prose(paragraph, words):
    """Keep running text: mostly letters, and a fair share of the language's most frequent words."""
    letters = sum(character.isalpha() or character == " " for character in paragraph)
    tokens = re.findall(r"[^\W\d_]+", paragraph.lower())
    if len(tokens) < 8 or letters < 0.9 * len(paragraph):
        return False
    return sum(token in words for token in tokens) >= 0.18 * len(tokens)


def tidy(text):
    text = text.replace("\u00a0", " ").replace("\u00ad", "").replace("\u200b", "")
    for old, new in (("“", '"'), ("”", '"'), ("’", "'"), ("‘", "'"), ("…", "..."), ("–", "-"), ("—", "-"),
                     ("„", '"'), ("«", '"'), ("»", '"'), ("‚", "'"), ("‐", "-"), ("‑", "-")):
        text = text.replace(old, new)
    return re.sub(r"\s+", " ", text).strip()


class Paragraphs(html.parser.HTMLParser):
    """The text of each block element; preformatted text, tables, navigation and scripts are left out."""
    BLOCKS = {"p", "div", "li", "h1", "h2", "h3", "h4", "h5", "blockquote", "dd", "dt", "td", "ul", "ol", "br",
              "table", "body", "tr", "hr"}
    SKIPPED = {"script", "style", "pre", "title", "sup", "table"}

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.skipping, self.current, self.paragraphs = 0, [], []

    def flush(self):
        text = tidy("".join(self.current))
        self.current = []
        if text:
            self.paragraphs.append(text)

    def handle_starttag(self, tag, attributes):
        if tag in self.SKIPPED:
            self.skipping += 1
        if tag in self.BLOCKS:
            self.flush()

    def handle_endtag(self, tag):
        if tag in self.SKIPPED and self.skipping:
            self.skipping -= 1
        if tag in self.BLOCKS:
            self.flush()

    def handle_data(self, data):
        if not self.skipping:
            self.current.append(data)


def read_text(path):
    data = path.read_bytes()
    if path.suffix == ".gz":
        data = gzip.decompress(data)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return data.decode("latin-1")


def html_paragraphs(path):
    parser = Paragraphs()
    parser.feed(read_text(path))
    parser.flush()
    return parser.paragraphs


def manual_page_paragraphs(path):
    """The running paragraphs of a roff page: requests only separate paragraphs, font changes are dropped."""
    paragraphs, current = [], []
    for line in read_text(path).split("\n"):
        if line.startswith((".", "'")):
            request = re.match(r"\.(B|I|BR|IR|RB|RI|BI|IB)\s+(.*)", line)
            if request:
                current.append(request.group(2).replace('"', ""))
                continue
            paragraphs.append(" ".join(current))
            current = []
        elif not line.strip():
            paragraphs.append(" ".join(current))
            current = []
        else:
            current.append(line)
    paragraphs.append(" ".join(current))
    cleaned = []
    for text in paragraphs:
        text = re.sub(r"\\f(\[[^\]]*\]|\(..|.)", "", text)
        text = re.sub(r"\\[,/&|%^:]", "", text)
        text = text.replace("\\-", "-").replace("\\(aq", "'").replace("\\(dq", '"').replace("\\(bu", "")
        text = text.replace("\\ ", " ").replace("\\~", " ").replace("\\(em", "-").replace("\\e", "/")
        if "\\" not in text:
            cleaned.append(tidy(text))
    return cleaned


def pieces(paragraphs, separator):
    """Join paragraphs into documents of about DOCUMENT_CHARACTERS."""
    current, length = [], 0
    for paragraph in paragraphs:
        if current and length + len(paragraph) > DOCUMENT_CHARACTERS:
            yield separator.join(current)
            current, length = [], 0
        current.append(paragraph)
        length += len(paragraph) + len(separator)
    if current:
        yield separator.join(current)


def prose_documents(paragraphs, words):
    return [piece for piece in pieces([text for text in paragraphs if is_prose(text, words)], "\n")
            if len(piece) >= 200]


def english(packages):
    folders = [packages / "anarchism/usr/share/doc/anarchism/html",
               packages / "debian-handbook/usr/share/doc/debian-handbook/html/en-US"]
    for folder in folders:
        for path in sorted(folder.glob("*.html")):
            yield prose_documents(html_paragraphs(path), ENGLISH_WORDS)


def german(packages):
    folders = [packages / "debian-handbook/usr/share/doc/debian-handbook/html/de-DE",
               packages / "debian-reference-de/usr/share/debian-reference",
               packages / "installation-guide-amd64/usr/share/doc/installation-guide-amd64/de",
               packages / "gimp-help-de/usr/share/gimp/2.0/help/de"]
    for folder in folders:
        for path in sorted(folder.glob("*.html")):
            yield prose_documents(html_paragraphs(path), GERMAN_WORDS)
    for path in sorted((packages / "manpages-de/usr/share/man/de").glob("man*/*.gz")):
        yield prose_documents(manual_page_paragraphs(path), GERMAN_WORDS)
    # Sayings and anecdotes: each saying is short, so neighbours share a document.
    for name in ("sprichworte", "zitate", "anekdoten", "wusstensie", "murphy", "sprueche", "tips"):
        path = packages / "fortunes-de/usr/share/games/fortunes/de" / name
        sayings = [tidy(saying) for saying in re.split(r"\n%\n", read_text(path))]
        documents = prose_documents(sayings, GERMAN_WORDS)
        for start in range(0, len(documents), 5):
            yield documents[start:start + 5]


def python(packages):
    """Standard-library modules, cut at blank lines between top-level statements. Tables of data are left out."""
    for package in ("libpython3.11-minimal", "libpython3.11-stdlib"):
        root = packages / package / "usr/lib/python3.11"
        for path in sorted(root.rglob("*.py")):
            relative = path.relative_to(root).as_posix()
            if not path.is_file() or path.is_symlink():
                continue
            if re.match(r"(encodings|pydoc_data|lib2to3/tests|test|_sysconfigdata)", relative):
                continue
            text = read_text(path).replace("\t", "    ").replace("\f", "")
            text = "\n".join(line.rstrip() for line in text.split("\n"))
            # A blank line is followed either by a top-level statement or by a member of a class.
            blocks = re.split(r"\n\n(?=(?:    )?\S)|\n\n\n+", text)
            yield [piece.strip("\n") + "\n" for piece in pieces(blocks, "\n\n") if 120 <= len(piece) <= 6000]


def metamath(packages):
    """Hypotheses and theorems of set.mm in file order; comments, syntax definitions and proofs are left out."""
    text = read_text(packages / "metamath-databases/usr/share/metamath/databases/set.mm")
    text = re.sub(r"\$\(.*?\$\)", " ", text, flags=re.S)
    statements = []
    for match in re.finditer(r"(\S+)\s+\$([aep])\s+\|-\s+(.*?)\s+\$[.=]", text, flags=re.S):
        label, kind, formula = match.groups()
        formula = re.sub(r"\s+", " ", formula)
        if len(formula) <= 400:
            statements.append(f"{label} ${kind} |- {formula} $.")
    block = []
    for statement in statements:
        block.append(statement)
        # End a block after a theorem, so that hypotheses stay with what they are for.
        if len(block) >= 60 and "$e" not in statement:
            yield [piece + "\n" for piece in pieces(block, "\n")]
            block = []


def main():
    packages, output = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    output.mkdir(parents=True, exist_ok=True)
    for domain, source in zip(DOMAINS, (english, german, python, metamath)):
        generator = random.Random(SPLIT_SEED)
        parts, seen = {"train": [], "heldout": []}, set()
        for documents in source(packages):
            part = "heldout" if generator.random() < HELD_OUT_SHARE else "train"
            for document in documents:
                if document not in seen:
                    seen.add(document)
                    parts[part].append(document)
        for part, documents in parts.items():
            generator.shuffle(documents)
            with open(output / f"{domain}.{part}.jsonl", "w", encoding="utf-8") as file:
                for document in documents:
                    file.write(json.dumps(document, ensure_ascii=False) + "\n")
            print(domain, part, len(documents), "documents", sum(len(d.encode()) for d in documents), "bytes")


if __name__ == "__main__":
    main()
