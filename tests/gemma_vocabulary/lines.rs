//! Texts of every kind a tokenizer meets, the same in every run but for those read from this repository.

use std::collections::HashSet;
use std::path::Path;

use crate::common::{Random, repository};

/// A text and the kind it is of.
pub struct Line {
    pub kind: &'static str,
    pub text: String,
}

const PROSE: [&str; 30] = [
    "The quick brown fox, who hadn't eaten since Tuesday, jumped over 13 lazy dogs.",
    "\"It's 5 o'clock,\" she said -- and left; nobody followed...",
    "Hello, my dog is cute",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich, sagte Frau Müller-Lüdenscheidt.",
    "Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft",
    "Voix ambiguë d'un cœur qui, au zéphyr, préfère les jattes de kiwis. ¿Qué tal, señor Ibáñez?",
    "Příliš žluťoučký kůň úpěl ďábelské ódy; pójdźże, kiń tę chmurność w głąb flaszy!",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "Ξεσκεπάζω την ψυχοφθόρα βδελυγμία.",
    "我能吞下玻璃而不伤身体。今天天气很好，我们一起去公园散步吧！",
    "人工智慧與機器學習：一二三四五六七八九十，百千萬億。",
    "𠀀𠀁𪜀𫝀 㐀㐁 — characters beyond the basic plane",
    "いろはにほへと　ちりぬるを。東京タワーは３３３メートルです。ｶﾀｶﾅ",
    "吾輩は猫である。名前はまだ無い。どこで生れたかとんと見当がつかぬ。",
    "صِف خَلقَ خَودِ كَمِثلِ الشَمسِ إِذ بَزَغَت — يَحظى الضَجيعُ بِها نَجلاءَ مِعطارِ",
    "السلام عليكم، كيف حالك؟ العدد ١٢٣٤٥٦٧٨٩٠",
    "דג סקרן שט בים מאוכזב ולפתע מצא חברה",
    "ऋषियों को सताने वाले दुष्ट राक्षसों के राजा रावण का सर्वनाश करने वाले विष्णुवतार भगवान श्रीराम।",
    "नमस्ते दुनिया, क्षत्रिय ज्ञान १२३",
    "키스의 고유조건은 입술끼리 만나야 하고 특별한 기술은 필요치 않다.",
    "각 (conjoining: \u{1100}\u{1161}\u{11A8}) 뷁 ㅋㅋㅋ",
    "เป็นมนุษย์สุดประเสริฐเลิศคุณค่า",
    "ཀྲུང་ཧྭ་མི་དམངས། ကမ္ဘာ ខ្មែរ ತಮಿಳು தமிழ்",
    "👨‍👩‍👧‍👦 👩🏽‍🚀 🏳️‍🌈 🏴󠁧󠁢󠁥󠁮󠁧󠁿 🇩🇪🇯🇵🇧🇷 1️⃣ ❤️‍🔥 ☺︎ 🤷🏻‍♂️",
    "e\u{301}\u{302}\u{323} n\u{303} A\u{30A} Z\u{335}\u{321}\u{353}a\u{300}\u{316}l\u{34D}g\u{337}o\u{489} ﬁ ﬀ ℌ ½ ²",
    "∀ε>0 ∃δ>0: |x−a|<δ ⇒ |f(x)−f(a)|<ε; ∑_{n=1}^∞ 1/n² = π²/6; \\frac{\\partial L}{\\partial w_{ij}}",
    "|- ( ( ph /\\ ps ) -> ( ch <-> -. th ) ) $. x ≡ y (mod 2^{64}) ⟨ψ|Ĥ|ψ⟩ ∮ ∇×𝐁 𝔸𝕽𝒞",
    "3.14159265358979323846 1,000,000 -17 0x7FFF_FFFF 1e-300 ١٢ Ⅷ ①② 192.168.0.1 2024-02-29T23:59:60Z",
    "https://user:pass@example.org:8080/a/b%20c/?q=%E2%82%AC&r=1#frag ftp://[::1]/ mailto:a.b+c@d.example",
    "\u{202B}right\u{202C} \u{200E}soft\u{AD}hyphen zero\u{200B}width no\u{A0}break \u{FEFF}mark \u{2028}line \u{3000}wide",
];

const CODE: [&str; 8] = [
    "fn main() {\n    let x: Vec<u8> = vec![0; 1 << 20];\n        println!(\"{x:?}\");\n}\n",
    "\tif (a[i] != NULL && *p++ == '\\0') {\n\t\t\treturn -1; /* done */\n\t}\r\n",
    "def f(self, *args, **kwargs):\n                                                return {k: v for k, v in args}\n",
    "for (;;) { \t \t x ^= ~y >>> 3; }\t// mixed\t\t \n\n\n\n\n",
    "#include <stdio.h>\r\n#define MAX(a,b) \\\r\n\t((a)>(b)?(a):(b))\r\n",
    "SELECT * FROM \"t\" WHERE a <> 'it''s' AND b IS NOT NULL;--\n",
    "{\"a\": [1, 2.5e+10, null, true, \"\\u00e9\\n\"], \"b\": {}}",
    "$ awk -F: '{ print $1 }' /etc/passwd | sort -u > /tmp/x 2>&1 && echo \"${HOME:-~}\"",
];

/// Markup that is a token, and what only looks like it.
const MARKUP: &str = "<pad>|<eos>|<bos>|<unk>|<mask>|<2mass>|[@BOS@]|<unused0>|<unused98>|<unused99>|<start_of_turn>|\
    <end_of_turn>|[toxicity=0]|<table>|</table>|<caption>|<thead>|<tbody>|<tr>|<td>|</td>|<h1>|</h6>|<blockquote>|<b>|\
    </b>|<i>|<s>|</s>|<sub>|<code>|<|>|<b|os>|<bo|<bos|s>|<start|_of_turn|<start_of_turn|<end_of_turn|start_of_turn>|\
    <start_of_turn\n>|<h1 |<h7>|</|<unused|[@BOS@|[toxicity=|<0x41>|<0xE9>|<0x0A>|<0x|user\n|model\n|\n|\n\n\n|  |\t\t";

/// What fills runs.
const FILLERS: &str = " |\n|\t|\r\n|\r|\u{A0}|\u{3000}|\u{2581}| \n|\n |\t |a|é|漢|😀|<|=|-|0|\0|\u{FFFD}|\u{E000}";

/// All lines. `pieces` are the texts of the vocabulary.
pub fn lines(pieces: &[String]) -> Vec<Line> {
    let mut random = Random::new(20);
    let markup: Vec<&str> = MARKUP.split('|').collect();
    let mut lines = Vec::new();
    let add = |lines: &mut Vec<Line>, kind, texts: Vec<String>| {
        lines.extend(texts.into_iter().map(|text| Line { kind, text }));
    };
    add(&mut lines, "prose", PROSE.map(String::from).to_vec());
    add(&mut lines, "code", CODE.map(String::from).to_vec());
    add(&mut lines, "markup", markup.iter().map(|text| text.to_string()).collect());
    add(&mut lines, "runs", runs());
    add(&mut lines, "characters", characters());
    add(&mut lines, "code points", code_points(&mut random));
    add(&mut lines, "pieces", piece_lines(pieces, &mut random));
    add(&mut lines, "markup among markup", (0..2000).map(|_| markup_among_markup(&markup, &mut random)).collect());
    add(&mut lines, "repository", repository_lines());
    let mixtures = (0..5000).map(|_| mixture(&lines, &markup, &mut random)).collect();
    add(&mut lines, "mixtures", mixtures);
    lines
}

/// Every length from 1 to 40, alone and between letters, and a few long ones.
fn runs() -> Vec<String> {
    let mut texts = Vec::new();
    for filler in FILLERS.split('|') {
        for length in 1..=40 {
            let run = filler.repeat(length);
            texts.extend([format!("a{run}b"), format!(" {run}é"), format!("{run}<b>{run}"), run]);
        }
        texts.extend([100, 1000, 10_000].map(|length| filler.repeat(length)));
    }
    texts
}

/// Every character of the first two planes once, 64 to a line: control, unassigned and private ones among them.
fn characters() -> Vec<String> {
    let codes: Vec<u32> = (0..0x2_0000).collect();
    codes.chunks(64).map(|codes| codes.iter().filter_map(|code| char::from_u32(*code)).collect()).collect()
}

/// Characters at random from everywhere, each plane as likely as the other.
fn code_points(random: &mut Random) -> Vec<String> {
    const STARTS: [u32; 8] = [0, 0x80, 0x800, 0xE000, 0x1_0000, 0x2_0000, 0xE_0000, 0x10_0000];
    let mut line = || {
        let count = 1 + random.below(40);
        let code = |_| STARTS[random.below(STARTS.len())] + random.below(0x1_0000) as u32;
        (0..count).map(code).filter_map(char::from_u32).collect()
    };
    (0..1000).map(|_| line()).collect()
}

/// Every piece of the vocabulary once, in random order, with and without a space between them.
fn piece_lines(pieces: &[String], random: &mut Random) -> Vec<String> {
    let mut order: Vec<&str> = pieces.iter().map(String::as_str).collect();
    for at in (1..order.len()).rev() {
        order.swap(at, random.below(at + 1));
    }
    order.chunks(64).map(|pieces| pieces.join(["", " "][random.below(2)])).collect()
}

fn markup_among_markup(markup: &[&str], random: &mut Random) -> String {
    (0..1 + random.below(12)).map(|_| markup[random.below(markup.len())]).collect()
}

/// Parts of lines of all kinds, cut anywhere between characters, one after the other.
fn mixture(lines: &[Line], markup: &[&str], random: &mut Random) -> String {
    let mut text = String::new();
    for _ in 0..1 + random.below(10) {
        let part = match random.below(3) {
            0 => PROSE[random.below(PROSE.len())],
            1 => markup[random.below(markup.len())],
            _ => &lines[random.below(lines.len())].text,
        };
        let start = part.floor_char_boundary(random.below(part.len() + 1));
        let end = part.floor_char_boundary(start + random.below(80));
        text.push_str(&part[start..end]);
    }
    text
}

/// The lines of this repository's texts, each once, and short files whole.
fn repository_lines() -> Vec<String> {
    let mut files = vec![repository().join("README.md"), repository().join("Makefile")];
    for directory in ["docs", "src", "include", "examples", "tests", "tools"] {
        collect_files(&repository().join(directory), &mut files);
    }
    files.sort();
    let mut seen = HashSet::new();
    let mut texts = Vec::new();
    for file in files {
        let Ok(text) = std::fs::read_to_string(&file) else { continue };
        if text.len() > 1 << 16 {
            continue;
        }
        texts.extend(text.lines().filter(|line| seen.insert(line.to_string())).map(String::from));
        texts.push(text);
    }
    texts
}

fn collect_files(directory: &Path, files: &mut Vec<std::path::PathBuf>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect_files(&path, files);
        } else if path.extension().is_some_and(|extension| extension != "safetensors") {
            files.push(path);
        }
    }
}
