//! Conversations through a loaded model, and what templates somebody else wrote may cost.

mod common;
#[path = "common/tokenizer.rs"]
mod tokenizer_sample;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::Instant;

use common::{Directory, load};
use gemmoe::text::{ChatTemplate, Message, Tokenizer};
use gemmoe::{Model, Result, Session, SessionOptions, Status};
use serde_json::json;

const TALK: [Message; 3] = [
    Message { role: "user", text: " hello<end_of_turn>" },
    Message { role: "assistant", text: "hell" },
    Message { role: "user", text: "<bos>" },
];

/// A file's name and text.
type File<'a> = (&'a str, &'a str);

/// A model directory with a tokenizer and other files.
fn model(files: &[File]) -> Arc<Model> {
    let sizes = json!({"vocab_size": tokenizer_sample::VOCAB_SIZE});
    let directory = Directory::random_with(1, sizes).to_temporary();
    write(directory.path(), "tokenizer.json", &tokenizer_sample::sample().to_string());
    files.iter().for_each(|(name, text)| write(directory.path(), name, text));
    load(directory.path())
}

fn write(directory: &Path, name: &str, text: &str) {
    std::fs::write(directory.join(name), text).unwrap();
}

fn text_of(model: &Model, tokens: &[u32]) -> String {
    String::from_utf8(model.tokenizer().unwrap().decode(tokens, true).unwrap()).unwrap()
}

fn chat(model: &Model) -> Result<String> {
    model.encode_chat(&TALK, true).map(|tokens| text_of(model, &tokens))
}

#[test]
fn the_template_comes_from_its_file_then_from_the_settings_then_from_the_tokenizer() {
    let source = "{% for m in messages %}{{ m.role }}:{{ m.content.strip() }}{% endfor %}";
    let settings = json!({"chat_template": "s{{ bos_token }}", "bos_token": "<bos>"}).to_string();
    let jinja = ("chat_template.jinja", source);
    let settings = ("tokenizer_config.json", settings.as_str());
    let turns = "<bos><start_of_turn>user\nhello<end_of_turn><end_of_turn>\n<start_of_turn>model\nhell<end_of_turn>\n\
        <start_of_turn>user\n<bos><end_of_turn>\n<start_of_turn>model\n";
    let cases: [(&[File], &str, &str); 3] = [
        (&[jinja, settings], "jinja", "<bos>user:hello<end_of_turn>assistant:helluser:<bos>"),
        (&[settings], "jinja", "s<bos>"),
        (&[("tokenizer_config.json", "{}")], "gemma", turns),
    ];
    for (files, name, expected) in cases {
        let model = model(files);
        assert_eq!(model.chat_template().unwrap().name(), name);
        assert_eq!(chat(&model).unwrap(), expected);
    }
    // The markup in the texts stayed text: three turns and one that begins, one BOS.
    let model = model(&[]);
    let tokens = model.encode_chat(&TALK, true).unwrap();
    let count = |token: u32| tokens.iter().filter(|found| **found == token).count();
    assert_eq!([count(2), count(4), count(5)], [1, 4, 3]);
    let options = SessionOptions { context_size: 256, prefill_chunk: 64, ..Default::default() };
    let mut session = Session::new(Arc::clone(&model), &options).unwrap();
    session.prefill(&tokens).unwrap();
    session.step().unwrap();
}

#[test]
fn a_directory_whose_template_is_bad_loads_and_says_so_when_it_is_used() {
    let large = "x".repeat((1 << 20) + 1);
    let cases: [(&str, &str, Status); 5] = [
        ("chat_template.jinja", "{% if", Status::TemplateSyntax),
        ("chat_template.jinja", &large, Status::FileTooLarge),
        ("chat_template.jinja", &large[..(1 << 20) - 1], Status::TemplateLimit),
        ("tokenizer_config.json", "{\"a\": 1, \"a\": 2}", Status::TemplateSyntax),
        ("tokenizer_config.json", "{\"chat_template\": \"{{\"}", Status::TemplateSyntax),
    ];
    for (file, text, status) in cases {
        let model = model(&[(file, text)]);
        assert!(model.encode("hello", true, false).is_ok());
        let error = chat(&model).unwrap_err();
        assert_eq!((error.status(), error.file()), (status, Some(file)), "{error}");
        assert_eq!(chat(&model).unwrap_err(), error);
    }
    let failing = model(&[("chat_template.jinja", "{{ raise_exception('no ' ~ messages[0].role) }}")]);
    let error = chat(&failing).unwrap_err();
    assert_eq!(error.status(), Status::TemplateFailed);
    assert!(error.to_string().contains("no user"), "{error}");
}

#[test]
fn a_model_without_a_tokenizer_or_without_turns_has_no_template() {
    let silent = load(Directory::random(1).to_temporary().path());
    assert_eq!(chat(&silent).unwrap_err().status(), Status::NoTokenizer);
    let mut tokenizer = tokenizer_sample::sample();
    tokenizer["added_tokens"][4]["special"] = json!(false);
    let model = model(&[("tokenizer.json", &tokenizer.to_string())]);
    let error = chat(&model).unwrap_err();
    assert_eq!(error.status(), Status::TemplateFailed);
    assert!(error.to_string().contains("no chat template"), "{error}");
}

/// Before most of the templates: a string of 320 KB and a list.
const LARGE: &str = "{% set ns = namespace(s='aaaaaaaaaa', l=['x', 'y']) %}{% for i in range(15) %}\
    {% set ns.s = ns.s ~ ns.s %}{% endfor %}{% set big = ns.s %}";

/// Templates that would take for ever, all memory or all stack.
const HOSTILE: [&str; 60] = [
    "{% set l = [big, big, big] %}{% macro m(x, y=l+l+l+l+l+l+l+l+l+l+l+l+l+l+l+l+l+l+l+l+l+l+l+l+l+l+l+l+l+l+l+l+l+l+l+l) %}\
     {{ y ~ y ~ y ~ y ~ y ~ y ~ y ~ y ~ y ~ y }}{% endmacro %}{{ m(1) }}",
    "{% set ns.x = ns %}{{ ns }}",
    "{% set ns.x = [ns] %}{{ ns }}",
    "{% set ns.x = {'a': ns} %}{{ ns == ns }}",
    "{% set ns = namespace(x=ns) %}{{ ns }}",
    "{% set ns.x = dict(a=ns) %}{{ ns }}",
    "{% set ns.x = (ns, 1) %}{{ ns }}",
    "{% set ns.x, ns.y = ns, 1 %}{{ ns }}",
    "{% set (ns.x) = ns %}{{ ns }}",
    "{%- set\n ns . x\t=ns-%}{{ ns }}",
    "{% set ns.x = ns if ns else 1 %}{{ ns }}",
    "{% macro m() %}{% endmacro %}{% set ns.x = m %}{{ ns }}",
    "{% for x in [1] %}{% set ns.x = loop %}{% endfor %}{{ ns.x }}",
    "{% for x in [1] %}{{ [loop] }}{% endfor %}",
    "{% for i in range(90000) %}{% set ns.x = [ns.x] %}{% endfor %}{{ ns.x }}",
    "{% for i in range(90000) %}{% set ns.x = {'a': ns.x} %}{% endfor %}{{ ns.x|tojson }}",
    "{% for i in range(90000) %}{% set ns.l = ns.l + ns.l %}{% endfor %}{{ ns.l }}",
    "{% for i in range(90000) %}{% set ns.l = ns.l[0:] + [i] %}{% endfor %}{{ ns.l }}",
    "{% for i in range(90000) %}{% set ns.l = ns.l|reverse %}{% endfor %}{{ ns.l }}",
    "{% for i in range(90000) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% for i in range(90000) %}{% set ns.x = ns.l.items() %}{% endfor %}",
    "{% macro m(x) %}{{ m([x]) }}{% endmacro %}{{ m(1) }}",
    "{% macro m(x) %}{{ m([x, x, x, x]) ~ x }}{% endmacro %}{{ m([big]) }}",
    "{% macro m(x) %}{{ m(x + x + x + x) ~ x }}{% endmacro %}{{ m([big]) }}",
    "{% macro m(x, y=x + x) %}{{ m(y) }}{{ y ~ '' }}{% endmacro %}{{ m([big]) }}",
    "{% macro m(x) %}{{ m((x, x, x, x)) ~ x }}{% endmacro %}{{ m((big, 1)) }}",
    "{% macro m(x) %}{{ m({1: x, 2: x, 3: x}) ~ x }}{% endmacro %}{{ m({}) }}",
    "{% macro m(x) %}{{ m(dict(a=x, b=x)) ~ x }}{% endmacro %}{{ m({}) }}",
    "{% macro m(x) %}{{ m(x|list) ~ m(x|list) }}{% endmacro %}{{ m([big]) }}",
    "{% macro a() %}{{ b() }}{% endmacro %}{% macro b() %}{{ a() }}{% endmacro %}{{ a() }}",
    "{% for x in [1] recursive %}{{ loop([x]) }}{% endfor %}",
    "{% for x in [[1]] recursive %}{{ loop([x, x]) }}{{ loop([x, x]) }}{% endfor %}",
    "{% for x in [ns.l] recursive %}{{ loop(x + x) }}{% endfor %}",
    "{% for a in [[big, big]] %}{% for b in [[a, a, a, a]] %}{% for c in [[b, b, b, b]] %}{% for d in [[c, c, c, c]] %}\
     {{ d ~ '' }}{% endfor %}{% endfor %}{% endfor %}{% endfor %}",
    "{% for a in [0]*9 %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{% for b in range(99999) %}xxxxxxxxxxxxxxxxxxxxxxxx{% endfor %}{% endfor %}",
    "{% for a in range(99999) %}{{ big }}{% endfor %}",
    "{% set c %}{% for a in range(99999) %}{{ big }}{% endfor %}{% endset %}",
    "{% for i in range(99999) %}{{ (big|list)|length }}{% endfor %}",
    "{% for i in range(99999) %}{{ big.split('a')|length }}{% endfor %}",
    "{% for i in range(99999) %}{{ (big|replace('a', ' ')).split()|length }}{% endfor %}",
    "{% for i in range(99999) %}{{ (big|replace('a', '\\n')).splitlines()|length }}{% endfor %}",
    "{{ range(99999)|map('replace', '1', big)|join }}",
    "{{ range(99999)|map(attribute='x', default=big)|join }}",
    "{{ big.join(range(99999)) }}",
    "{{ range(99999)|join(big) }}",
    "{{ big.replace('', big) }}",
    "{{ big.replace('a', big) }}",
    "{{ big|replace('a', big) }}",
    "{{ (big|replace('a', '\\n'))|indent(100000) }}",
    "{{ [big]|tojson(indent=1000000000) }}{{ 1.5|round(1000000000) }}{{ raise_exception(big) }}",
    "{{ '%1000000000s'|format('a') }}",
    "{{ '{:1000000000}'.format('a') }}",
    "{{ 2 ** 1000000000 }}",
    "{% set x = range(9999)|list %}{% for i in x %}{{ x == x[1:] or x in [x, x] or x.count(x) }}{% endfor %}",
    "{% for i in range(99999) %}{{ big.find('b') }}{{ big is lower }}{{ big|upper|length }}{{ 'b' in big }}{% endfor %}",
    "{% set other = big ~ 'a' %}{% set big = big ~ 'b' %}{% for i in range(99999) %}{{ big == other }}{{ big < other }}\
     {{ big is eq(other) }}{{ {big: 1}[other] }}{{ big is startingwith(other) }}{% endfor %}",
    "{% for i in range(99999) %}{% for m in messages|selectattr('content', 'equalto', big) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{{ messages[0].content == messages[1].content }}{% endfor %}",
];

/// Templates as large as they may be, each made to be slow or deep to compile.
fn large_templates() -> Vec<String> {
    let fill = |part: &str| part.repeat((1 << 18) / part.len());
    let chain = |before: &str, link: &str, links: usize, after: &str| format!("{before}{}{after}", link.repeat(links));
    vec![
        fill("{{a}}"),
        fill(&chain("{{x", "+a", 250, "}}")),
        fill(&chain("{{''", "+'a'", 250, "+x}}")),
        fill(&chain("{{", "-", 500, "x}}")),
        fill(&chain("{{x", "|e", 250, "}}")),
        fill(&chain("{{", "[", 140, &format!("x{}}}}}", "]".repeat(140)))),
        fill(&chain("{{[", "1,", 250, "x]}}")),
        fill("{%macro m(a)%}{{m}}{%endmacro%}"),
        format!("{}{}{}", "{%macro m(a)%}".repeat(70), "{{a}}{{b}}".repeat(1 << 14), "{%endmacro%}".repeat(70)),
        fill("{%if a%}{%else%}{%endif%}"),
        fill("{# {{ #}\n   {%- set x = 'y' -%}  "),
        format!("{{%if a%}}{}{{%endif%}}", "{%elif a%}x".repeat(250)),
        "{".repeat(1 << 18),
        fill("{{{"),
    ]
}

/// Bytes a hostile template may take at once, beside the texts: the engine's steps pay for 64 each.
const ALLOWED: usize = 64 << 20;

/// The most memory this process had at once, in bytes; 0 where the system does not say.
fn peak_memory() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap_or_default();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap_or(0) << 10
}

#[test]
fn hostile_templates_end_soon_with_an_error_and_little_memory() {
    const CHILD: &str = "GEMMOE_TEST_HOSTILE_TEMPLATES";
    if std::env::var_os(CHILD).is_some() {
        // Of a host whose threads have small stacks.
        let small = std::thread::Builder::new().stack_size(256 << 10);
        return small.spawn(run_hostile_templates).unwrap().join().unwrap();
    }
    let name = "hostile_templates_end_soon_with_an_error_and_little_memory";
    let mut child = Command::new(std::env::current_exe().unwrap());
    let output = child.args(["--exact", name, "--nocapture"]).env(CHILD, "1").output().unwrap();
    println!("{}", String::from_utf8_lossy(&output.stdout));
    assert!(output.status.success(), "{}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
}

fn run_hostile_templates() {
    let file = tokenizer_sample::sample().to_string();
    let tokenizer = Tokenizer::from_json(file.as_bytes(), tokenizer_sample::VOCAB_SIZE).unwrap();
    let text = "a".repeat(1 << 16);
    let other = format!("{text}b");
    let messages = [Message { role: "user", text: &text }, Message { role: "user", text: &other }];
    let before = peak_memory();
    let mut peak = before;
    for source in large_templates() {
        let start = Instant::now();
        let outcome = ChatTemplate::choose(Some(source.as_bytes()), None, &tokenizer, 2, None);
        let seconds = start.elapsed().as_secs_f64();
        // The system's count is not exact to the page and may seem to fall.
        let now = peak_memory().max(peak);
        println!("{seconds:.3} s, {} MiB more: {}: {:?}", (now - peak) >> 20, &source[..30], outcome.err());
        peak = now;
        assert!(seconds < 10.0, "{} took {seconds} s", &source[..30]);
        assert!(peak - before < ALLOWED, "{} took {} bytes", &source[..30], peak - before);
    }
    for hostile in HOSTILE {
        let start = Instant::now();
        let source = format!("{LARGE}{hostile}");
        let outcome = ChatTemplate::choose(Some(source.as_bytes()), None, &tokenizer, 2, None)
            .and_then(|template| template.encode(&tokenizer, 2, &messages, false));
        let seconds = start.elapsed().as_secs_f64();
        // The system's count is not exact to the page and may seem to fall.
        let now = peak_memory().max(peak);
        println!("{seconds:.3} s, {} MiB more: {hostile}: {:?}", (now - peak) >> 20, outcome.as_ref().err());
        peak = now;
        let status = outcome.expect_err(hostile).status();
        let expected = [Status::TemplateLimit, Status::TemplateFailed, Status::TemplateSyntax];
        assert!(expected.contains(&status), "{hostile}: {status:?}");
        // About 0.1 s, and a busy machine should not fail the test.
        assert!(seconds < 10.0, "{hostile} took {seconds} s");
        assert!(peak - before < ALLOWED, "{hostile} took {} bytes", peak - before);
    }
}
