//! Templates against a small tokenizer: what they give, what no text can make them give, and what hostile ones cost.

use serde_json::{Value, json};

use super::*;
use crate::text::samples::{Random, VOCAB_SIZE, sample};
use crate::text::tokenizer::EncodeOptions;

const BOS: u32 = 2;

/// Gemma's own template, from what it is known to do.
const GEMMA: &str = "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not \
    supported') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) \
    %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if \
    (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}\
    {{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}\
    {% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}";

const CHAT_ML: &str = "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + \
    '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

const NAMESPACE: &str = "{%- set ns = namespace(system='', seen=false, list=[]) -%}\n\
    {%- for message in messages -%}\n    {%- if message.role == 'system' -%}\n\
    {%- set ns.system = ns.system + message.content.strip() -%}\n    {%- set ns.seen = true -%}\n    {%- endif -%}\n\
    {%- endfor -%}\n{%- for message in messages if message.role != 'system' -%}\n{{- bos_token if loop.first -}}\n\
    {%- set ns.list = ns.list + [message.role] -%}\n<start_of_turn>{{ message.role }}{{ '\\n' }}\n\
    {%- if loop.first and ns.seen -%}{{ ns.system ~ '\\n\\n' }}{%- endif -%}\n\
    {{ message.content }}<end_of_turn>{{ '\\n' }}\n{%- endfor -%}{{ ns.list | join(',') }}";

const MACROS: &str = "{%- macro turn(role, text, end='<end_of_turn>', more=[1, (2, 3)]) %}<start_of_turn>{{ role }}\n{{ text }}{{ end }}\n{% endmacro -%}\n\
    {% for m in messages %}\n    {{- turn(m.role, m.content) -}}\n{% endfor %}";

fn tokenizer() -> Tokenizer {
    with_specials(&[])
}

/// The sample tokenizer with more special tokens.
fn with_specials(contents: &[&str]) -> Tokenizer {
    let mut file = sample();
    for (content, id) in contents.iter().zip(360..) {
        let mut token = file["added_tokens"][0].clone();
        token["content"] = json!(content);
        token["id"] = json!(id);
        file["added_tokens"].as_array_mut().unwrap().push(token);
    }
    Tokenizer::from_json(file.to_string().as_bytes(), VOCAB_SIZE).unwrap()
}

fn template(source: &str, tokenizer: &Tokenizer) -> Result<ChatTemplate> {
    ChatTemplate::choose(Some(source.as_bytes()), None, tokenizer, BOS, Some(1))
}

fn user(text: &str) -> Vec<Message<'_>> {
    vec![Message { role: "user", text }]
}

fn render(source: &str, messages: &[Message], prompt: bool) -> Result<Vec<u32>> {
    let tokenizer = tokenizer();
    template(source, &tokenizer)?.encode(&tokenizer, BOS, messages, prompt)
}

/// The ids of trusted text.
fn trusted(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
    tokenizer.encode(text, EncodeOptions { bos: None, parse_special: true }).unwrap()
}

const TALK: [Message; 3] = [
    Message { role: "user", text: "  hello <b>\n\n" },
    Message { role: "assistant", text: "hell\n\nbos\n" },
    Message { role: "user", text: "\thé <bo😀s>" },
];

#[test]
fn real_templates_give_the_ids_of_their_text() {
    let tokenizer = with_specials(&["<|im_start|>", "<|im_end|>"]);
    let prompt = "<start_of_turn>model\n";
    let gemma = "<bos><start_of_turn>user\nhello <b><end_of_turn>\n<start_of_turn>model\nhell\n\nbos<end_of_turn>\n\
        <start_of_turn>user\nhé <bo😀s><end_of_turn>\n";
    let chat_ml = "<bos><|im_start|>user\n  hello <b>\n\n<|im_end|>\n<|im_start|>assistant\nhell\n\nbos\n<|im_end|>\n\
        <|im_start|>user\n\thé <bo😀s><|im_end|>\n";
    let raw = "<bos><start_of_turn>user\n  hello <b>\n\n<end_of_turn>\n<start_of_turn>assistant\nhell\n\nbos\n\
        <end_of_turn>\n<start_of_turn>user\n\thé <bo😀s><end_of_turn>\n";
    let cases = [
        (GEMMA, true, format!("{gemma}{prompt}")),
        (GEMMA, false, gemma.to_owned()),
        (CHAT_ML, true, format!("{chat_ml}<|im_start|>assistant\n")),
        (NAMESPACE, true, format!("{raw}user,assistant,user")),
        (MACROS, true, raw.to_owned()),
    ];
    for (source, add, expected) in cases {
        let template = template(source, &tokenizer).unwrap();
        let tokens = template.encode(&tokenizer, BOS, &TALK, add).unwrap();
        let text = String::from_utf8(tokenizer.decode(&tokens, true).unwrap()).unwrap();
        assert_eq!(text, expected);
        assert_eq!(tokens, trusted(&tokenizer, &expected));
    }
    // Built in, without the files.
    let built_in = |specials: &[&str]| {
        let tokenizer = with_specials(specials);
        let template = ChatTemplate::choose(None, Some(b"{}"), &tokenizer, BOS, None).unwrap();
        (template.name(), template.encode(&tokenizer, BOS, &TALK, false).unwrap())
    };
    assert_eq!(built_in(&["<|im_start|>", "<|im_end|>"]), ("chatml", trusted(&tokenizer, chat_ml)));
    assert_eq!(built_in(&["<|im_start|>"]), ("gemma", trusted(&tokenizer, gemma)));
}

#[test]
fn gemma_turns_fold_a_system_message_into_the_first() {
    let tokenizer = tokenizer();
    let template = ChatTemplate::choose(None, None, &tokenizer, BOS, None).unwrap();
    let messages = [Message { role: "system", text: " Be\n" }, TALK[0], Message { role: "model", text: "ok" }];
    let expected = "<bos><start_of_turn>user\nBe\n\nhello <b><end_of_turn>\n<start_of_turn>model\nok<end_of_turn>\n";
    let tokens = template.encode(&tokenizer, BOS, &messages, false).unwrap();
    assert_eq!(tokens, trusted(&tokenizer, expected));
    let refused: [(&[Message], &str); 5] = [
        (&messages[..1], "messages"),
        (&[TALK[1]], "messages[0].role"),
        (&[TALK[0], TALK[0]], "messages[1].role"),
        (&[messages[0], TALK[1]], "messages[1].role"),
        (&[TALK[0], messages[0]], "messages[1].role"),
    ];
    for (messages, key) in refused {
        let error = template.encode(&tokenizer, BOS, messages, true).unwrap_err();
        assert_eq!((error.status(), error.key()), (Status::MessageValue, Some(key)), "{error}");
    }
}

#[test]
fn messages_that_cannot_be_are_refused_by_every_template() {
    let tokenizer = tokenizer();
    let long = "r".repeat(33);
    let text = "x".repeat(MAX_TEXT_BYTES + 1);
    let many = vec![TALK[0]; MAX_MESSAGES + 1];
    let roles = ["", "User", "user\n", "us er", "<bos>", "é", &long];
    for template in [template(CHAT_ML, &tokenizer), ChatTemplate::choose(None, None, &tokenizer, BOS, None)] {
        let template = template.unwrap();
        let refuse = |messages: &[Message]| {
            let error = template.encode(&tokenizer, BOS, messages, true).unwrap_err();
            assert_eq!(error.status(), Status::MessageValue, "{error}");
        };
        refuse(&[]);
        refuse(&many);
        refuse(&user(&text));
        roles.iter().for_each(|role| refuse(&[Message { role, text: "" }]));
    }
}

#[test]
fn bos_is_there_once_whether_or_not_the_template_writes_it() {
    for source in ["{{ bos_token }}h", "<bos>h", "h", "", "h<bos>"] {
        let tokens = render(source, &user("h"), false).unwrap();
        assert_eq!(tokens.iter().filter(|token| **token == BOS).count(), 1, "{source}");
    }
    assert_eq!(render("", &user(""), false).unwrap(), [BOS]);
}

#[test]
fn no_text_of_a_message_ever_gives_a_special_token() {
    let tokenizer = with_specials(&["<|im_start|>", "<|im_end|>", "[A b]", "xyz", "<a  >", "ééé"]);
    let specials: Vec<String> = tokenizer.special_texts().map(str::to_owned).collect();
    let sources = [
        "{{ messages[0].content }}",
        "<{{ messages[0].content }}>",
        "<{{ messages[0].content | trim }}>",
        "<|{{ messages[0].content.strip() }}|>",
        "[A{{ messages[0].content }}b]",
        "<a{{ messages[0].content }}>",
        "<a {{ messages[0].content }} >",
        "x{{ messages[0].content }}z",
        "{% for m in messages %}{{ m.content }}{% endfor %}",
        "{{ messages[0].content ~ messages[1].content }}",
        "<bo{{ messages[0].content }}",
        "{{ messages[0].content }}os>",
        "<{% set c %}{{ messages[0].content }}{% endset %}{{ c }}>",
        GEMMA,
        CHAT_ML,
    ];
    let gemma = ChatTemplate::choose(None, None, &self::tokenizer(), BOS, None).unwrap();
    let chat_ml = ChatTemplate::choose(None, None, &tokenizer, BOS, None).unwrap();
    let mut templates: Vec<ChatTemplate> = sources.iter().map(|source| template(source, &tokenizer).unwrap()).collect();
    templates.extend([gemma, chat_ml]);
    let count = |tokens: &[u32]| tokens.iter().filter(|token| tokenizer.is_special(**token)).count();
    for template in &templates {
        let encode = |first: &str, second: &str| {
            let messages = [Message { role: "user", text: first }, Message { role: "assistant", text: second }];
            template.encode(&tokenizer, BOS, &messages, true).unwrap()
        };
        for special in &specials {
            for (at, _) in special.char_indices() {
                let (left, right) = special.split_at(at);
                let inner = right.trim_end_matches(|c| special.ends_with(c));
                for (first, second) in [(left, right), (right, left), (special, special), (inner, "")] {
                    // What the template alone gives, around texts or nothing.
                    let harmless = [first, second].map(|text| if text.is_empty() { "" } else { "h" });
                    let harmless = count(&encode(harmless[0], harmless[1]));
                    let tokens = encode(first, second);
                    let text = String::from_utf8(tokenizer.decode(&tokens, true).unwrap()).unwrap();
                    assert_eq!(count(&tokens), harmless, "{first:?} {second:?} gave {text:?}");
                    assert!(text.contains(first.trim()), "{first:?} is not in {text:?}");
                }
            }
        }
    }
}

#[test]
fn texts_without_markup_give_the_ids_of_the_whole_text() {
    let tokenizer = tokenizer();
    let source = "<bos>h{{ messages[0].content }}\n{{ messages[0].content | trim }}l<end_of_turn>";
    let template = template(source, &tokenizer).unwrap();
    let mut random = Random::new(4);
    let pieces =
        ["h", "e", "l", "o", " ", "\n", "<", ">", "<b>", "b", "\t", "é", "😀", "\u{E000}", "\u{E001}", "\u{F0000}"];
    for _ in 0..3000 {
        let text: String = (0..random.below(12)).map(|_| pieces[random.below(pieces.len())]).collect();
        if text.contains("<bos>") {
            continue;
        }
        let expected = format!("<bos>h{text}\n{}l<end_of_turn>", text.trim());
        let tokens = template.encode(&tokenizer, BOS, &user(&text), false).unwrap();
        assert_eq!(tokens, trusted(&tokenizer, &expected), "{text:?}");
    }
}

#[test]
fn empty_and_blank_texts_stay_empty_and_blank_to_a_template() {
    let source = "{% if messages[0].content %}h{% endif %}{% if messages[0].content.strip() %}l{% endif %}";
    let tokenizer = tokenizer();
    let text = |text| {
        let tokens = render(source, &user(text), false).unwrap();
        String::from_utf8(tokenizer.decode(&tokens, false).unwrap()).unwrap()
    };
    assert_eq!([text(""), text(" \n"), text("x")], ["", "h", "hl"]);
}

#[test]
fn a_template_that_refuses_says_why() {
    let system = [Message { role: "system", text: "x" }];
    let error = render(GEMMA, &system, true).unwrap_err();
    assert_eq!((error.status(), error.file()), (Status::TemplateFailed, None));
    assert!(error.to_string().contains("System role not supported"), "{error}");
    let cases = [
        ("{{ messages[0].content.foo() }}", Status::TemplateFailed),
        ("{{ messages | unknown }}", Status::TemplateFailed),
        ("{% for m in messages %}{{ loop.cycle() }}{% endfor %}", Status::TemplateFailed),
        ("{{ '%1000000000d' | format(1) }}", Status::TemplateFailed),
        (
            "{% for m in messages %}{{ m }}{{ m.content.count('x') }}{% endfor %}{{ raise_exception(1) }}",
            Status::TemplateFailed,
        ),
        ("{{ '{:1000000000}'.format(1) }}", Status::TemplateFailed),
    ];
    for (source, status) in cases {
        let error = render(source, &user("x"), false).unwrap_err();
        assert_eq!(error.status(), status, "{source}: {error}");
    }
}

#[test]
fn a_source_that_is_no_template_is_refused_with_its_file() {
    let tokenizer = tokenizer();
    let cases: [(&[u8], Status); 10] = [
        (b"{% if", Status::TemplateSyntax),
        (b"{{ messages", Status::TemplateSyntax),
        (b"{% endfor %}", Status::TemplateSyntax),
        (b"{% include 'x' %}", Status::TemplateSyntax),
        (b"{% set x =%}", Status::TemplateSyntax),
        (b"{{ gemmoe_flat(1) }}", Status::TemplateSyntax),
        (b"{% for m in messages %}{{ loop . changed(loop) }}{% endfor %}", Status::TemplateSyntax),
        (b"\xff", Status::TemplateSyntax),
        (&[b'x'; (1 << 18) + 1], Status::TemplateLimit),
        (b"{% raw %}{% endraw %}", Status::TemplateSyntax),
    ];
    for (source, status) in cases {
        let error = ChatTemplate::choose(Some(source), None, &tokenizer, BOS, None).err().unwrap();
        let name = String::from_utf8_lossy(&source[..source.len().min(60)]);
        assert_eq!((error.status(), error.file()), (status, Some(TEMPLATE_FILE)), "{name}: {error}");
    }
}

#[test]
fn a_tree_too_deep_for_a_stack_is_refused() {
    let chain = |before: &str, link: &str, after: &str| format!("{before}{}{after}", link.repeat(2000));
    let cases = [
        chain("{{ ", "-", "1 }}"),
        chain("{{ ", "not ", "1 }}"),
        chain("{{ a", ".a", " }}"),
        chain("{{ a", "[0]", " }}"),
        chain("{{ a", "|upper", " }}"),
        chain("{{ a", "+a", " }}"),
        chain("{{ a", " if a else a", " }}"),
        chain("{{ ", "(", "a }}"),
        chain("{% set ", "(", "a = 1 %}"),
        chain("{% if a %}", "{% elif a %}", "{% endif %}"),
        chain("{# {{ #}{{ '}}' ~ {'a': '%}'}", "~{}", " }}"),
    ];
    for source in &cases {
        let error = template(source, &tokenizer()).err().unwrap();
        assert_eq!(error.status(), Status::TemplateLimit, "{}: {error}", &source[..30]);
    }
    for statement in ["{% if a %}", "{% for a in b %}", "{% macro a() %}", "{% set a %}"] {
        assert_eq!(template(&statement.repeat(2000), &tokenizer()).err().unwrap().status(), Status::TemplateLimit);
    }
}

#[test]
fn what_the_engine_compiles_it_still_compiles_when_it_is_prepared() {
    let words = [
        "a",
        "1",
        "1.5",
        "'x'",
        "\"}}\"",
        "'%}'",
        "(",
        ")",
        "[",
        "]",
        "{",
        "}",
        ",",
        ":",
        ".",
        "|e",
        "|join(",
        "f(",
        "k=",
        " if ",
        " else ",
        " in ",
        " not ",
        " and ",
        " is defined ",
        " is in ",
        "~",
        "+",
        "-",
        "==",
        "//",
        "'",
        "\n",
    ];
    let compiles = |source: &str| minijinja::Environment::new().template_from_str(source).is_ok();
    let mut random = Random::new(5);
    let mut compiled = 0;
    for _ in 0..200_000 {
        let inside: String = (0..1 + random.below(9)).map(|_| words[random.below(words.len())]).collect();
        let frames = ["{{", "}}", "{% if", "%}{% endif %}", "{% set x =", "%}", "{%- for (x, y) in", "-%}{% endfor %}"];
        let frame = 2 * random.below(4);
        let source = format!("{} {inside} {}", frames[frame], frames[frame + 1]);
        // The engine takes `else` for a name where it cannot be a word of its own; no template needs that.
        let is_name = |word: &str| {
            source
                .match_indices(word)
                .any(|(at, _)| compiles(&format!("{} name {}", &source[..at], &source[at + word.len()..])))
        };
        if compiles(&source) && ![" if ", " else ", " in ", " not ", " and "].into_iter().any(is_name) {
            compiled += 1;
            let prepared = source::prepare(&source).unwrap_or_else(|error| panic!("{source:?}: {error}"));
            assert!(compiles(&prepared), "{source:?} became {prepared:?}");
        }
    }
    assert!(compiled > 2000, "{compiled}");
}

#[test]
fn settings_are_read_and_refused_by_what_they_say() {
    let tokenizer = tokenizer();
    let choose =
        |settings: &Value| ChatTemplate::choose(None, Some(settings.to_string().as_bytes()), &tokenizer, BOS, Some(1));
    let written = |settings: Value| {
        let tokens = choose(&settings).unwrap().encode(&tokenizer, BOS, &user("h"), false).unwrap();
        String::from_utf8(tokenizer.decode(&tokens, true).unwrap()).unwrap()
    };
    let tokens = "{{ bos_token }}{{ eos_token }}";
    let list = json!([{"name": "rag", "template": "e"}, {"name": "default", "template": "l", "extra": 1}]);
    assert_eq!(written(json!({"chat_template": tokens})), "<bos><eos>");
    assert_eq!(written(json!({"chat_template": tokens, "eos_token": "<end_of_turn>"})), "<bos><end_of_turn>");
    assert_eq!(written(json!({"chat_template": tokens, "eos_token": {"content": "ll", "x": []}})), "<bos>ll");
    assert_eq!(written(json!({"chat_template": list, "added_tokens_decoder": {"0": {"a": [1, {}]}}})), "<bos>l");
    assert_eq!(choose(&json!({"chat_template": null, "bos_token": null})).unwrap().name(), "gemma");
    let both = ChatTemplate::choose(Some(b"o"), Some(b"{\"chat_template\": \"{%\"}"), &tokenizer, BOS, None).unwrap();
    assert_eq!(both.encode(&tokenizer, BOS, &user("h"), false).unwrap().len(), 2);

    let broken = [
        "",
        "[]",
        "{",
        "{\"chat_template\": 3}",
        "{\"chat_template\": []}",
        "{\"chat_template\": [{\"name\": \"x\", \"template\": \"\"}]}",
        "{\"chat_template\": [{\"name\": \"default\", \"name\": \"x\", \"template\": \"\"}]}",
        "{\"chat_template\": \"a\", \"chat_template\": \"b\"}",
        "{\"other\": 1, \"other\": 2}",
        "{\"bos_token\": {\"content\": \"a\", \"content\": \"b\"}}",
        "{\"bos_token\": 2}",
        "{\"chat_template\": \"{%\"}",
    ];
    for text in broken {
        let error = ChatTemplate::choose(None, Some(text.as_bytes()), &tokenizer, BOS, None).err().unwrap();
        let found = (error.status(), error.file());
        assert_eq!(found, (Status::TemplateSyntax, Some(SETTINGS_FILE)), "{text}: {error}");
    }
}
