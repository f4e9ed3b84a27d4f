//! Chats as the text that a model was trained on.

use std::path::Path;
use std::sync::Arc;

use candle_core::quantized::gguf_file::Content;
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, UndefinedBehavior, Value, context};
use serde::{Deserialize, Serialize};

use super::refused;
use crate::{Error, Result};

/// What somebody says in a chat.
///
/// ```
/// use course::tokenizer::Message;
///
/// let message: Message = serde_json::from_str(r#"{"role": "user", "content": "Hello"}"#)?;
/// assert_eq!(message, Message::user("Hello"));
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who says it: `system`, `user` or `assistant`.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    fn of(role: &str, content: impl Into<String>) -> Self {
        Self {
            role: role.to_string(),
            content: content.into(),
        }
    }

    /// What the assistant is told beforehand.
    pub fn system(content: impl Into<String>) -> Self {
        Self::of("system", content)
    }

    /// What the user says.
    pub fn user(content: impl Into<String>) -> Self {
        Self::of("user", content)
    }

    /// What the model answers.
    pub fn assistant(content: impl Into<String>) -> Self {
        Self::of("assistant", content)
    }
}

/// How a model that was trained to chat wants its messages: a Jinja template, as in
/// `tokenizer_config.json`.
///
/// Source: transformers `apply_chat_template`.
///
/// ```
/// use course::tokenizer::{ChatTemplate, Message};
///
/// let jinja = "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}\
///              {% if add_generation_prompt %}<assistant>{% endif %}";
/// let template = ChatTemplate::new(jinja, "", "")?;
/// let chat = [Message::user("Hello!"), Message::assistant("Hi.")];
/// assert_eq!(template.apply(&chat, false)?, "<user>Hello!<assistant>Hi.");
/// assert_eq!(template.apply(&chat[..1], true)?, "<user>Hello!<assistant>");
/// # Ok::<(), course::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    bos_token: String,
    eos_token: String,
}

const NAME: &str = "chat";

/// `tokenizer_config.json`.
#[derive(Default, Deserialize)]
struct TokenizerConfig {
    chat_template: Option<Templates>,
    bos_token: Option<Token>,
    eos_token: Option<Token>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Several(Vec<Named>),
}

#[derive(Deserialize)]
struct Named {
    name: String,
    template: String,
}

/// A token as a text, or with how it is found in one.
#[derive(Deserialize)]
#[serde(untagged)]
enum Token {
    Text(String),
    Added { content: String },
}

impl Token {
    fn text(token: Option<Self>) -> Option<String> {
        token.map(|(Self::Text(text) | Self::Added { content: text })| text)
    }
}

impl TokenizerConfig {
    /// That of a folder; nothing where it has none.
    fn read(folder: &Path) -> Result<Self> {
        let file = folder.join("tokenizer_config.json");
        if !file.exists() {
            return Ok(Self::default());
        }
        let bytes = std::fs::read(&file).map_err(Error::file(&file))?;
        serde_json::from_slice(&bytes)
            .map_err(|error| refused(format!("{}: {error}", file.display())))
    }
}

/// The token that ends a text, by `tokenizer_config.json`.
pub(crate) fn eos_token_of_folder(folder: &Path) -> Result<Option<String>> {
    Ok(Token::text(TokenizerConfig::read(folder)?.eos_token))
}

/// The same, by a GGUF file.
pub(crate) fn eos_token_of_gguf(content: &Content) -> Option<String> {
    token_of_gguf(content, "tokenizer.ggml.eos_token_id")
}

fn token_of_gguf(content: &Content, key: &str) -> Option<String> {
    let id = content.metadata.get(key)?.to_u32().ok()?;
    let tokens = content
        .metadata
        .get("tokenizer.ggml.tokens")?
        .to_vec()
        .ok()?;
    Some(tokens.get(id as usize)?.to_string().ok()?.clone())
}

impl ChatTemplate {
    /// A template and the tokens that it may speak of.
    ///
    /// # Errors
    ///
    /// A text that is no Jinja.
    pub fn new(
        jinja: impl Into<String>,
        bos_token: impl Into<String>,
        eos_token: impl Into<String>,
    ) -> Result<Self> {
        let mut environment = Environment::new();
        // As transformers sets Jinja.
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build();
        environment.set_syntax(syntax.map_err(|error| refused(error.to_string()))?);
        environment.set_undefined_behavior(UndefinedBehavior::Lenient);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| {
            Err::<String, _>(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment
            .add_template_owned(NAME, jinja.into())
            .map_err(|error| refused(format!("the chat template is no Jinja: {error}")))?;
        Ok(Self {
            environment: Arc::new(environment),
            bos_token: bos_token.into(),
            eos_token: eos_token.into(),
        })
    }

    /// The template of a folder as Hugging Face lays it out.
    pub(crate) fn open(folder: &Path) -> Result<Self> {
        let config = TokenizerConfig::read(folder)?;
        let alone = folder.join("chat_template.jinja");
        let jinja = if alone.is_file() {
            Some(std::fs::read_to_string(&alone).map_err(Error::file(&alone))?)
        } else {
            config.chat_template.and_then(|templates| match templates {
                Templates::One(jinja) => Some(jinja),
                Templates::Several(all) => {
                    let default = all.into_iter().find(|named| named.name == "default");
                    default.map(|named| named.template)
                }
            })
        };
        let Some(jinja) = jinja else {
            return Err(refused(format!(
                "{} has no chat template; take a model that was trained to chat, such as one \
                 whose name ends in Instruct",
                folder.display()
            )));
        };
        let text = |token| Token::text(token).unwrap_or_default();
        Self::new(jinja, text(config.bos_token), text(config.eos_token))
    }

    /// The template of a GGUF file.
    pub(crate) fn from_gguf(content: &Content) -> Result<Self> {
        let jinja = content.metadata.get("tokenizer.chat_template");
        let Some(jinja) = jinja.and_then(|v| v.to_string().ok()) else {
            return Err(refused(
                "the GGUF file has no tokenizer.chat_template".into(),
            ));
        };
        let bos = token_of_gguf(content, "tokenizer.ggml.bos_token_id");
        let eos = eos_token_of_gguf(content);
        Self::new(
            jinja.clone(),
            bos.unwrap_or_default(),
            eos.unwrap_or_default(),
        )
    }

    /// The text of a chat; with `add_generation_prompt` what makes the model answer stands at its
    /// end.
    ///
    /// # Errors
    ///
    /// A template that cannot be filled in with these messages; what it says itself about them.
    pub fn apply(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let failed = |error: minijinja::Error| refused(format!("the chat template: {error}"));
        let template = self.environment.get_template(NAME).map_err(failed)?;
        let pairs = |message: &Message| {
            Value::from_pairs([("role", &message.role), ("content", &message.content)])
        };
        let messages: Vec<Value> = messages.iter().map(pairs).collect();
        let filled = template.render(context! {
            messages,
            // As transformers: known, and nothing.
            tools => (),
            documents => (),
            add_generation_prompt,
            bos_token => self.bos_token.as_str(),
            eos_token => self.eos_token.as_str(),
        });
        filled.map_err(failed)
    }

    /// The token that ends an answer.
    #[must_use]
    pub fn eos_token(&self) -> &str {
        &self.eos_token
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        folder
    }

    #[test]
    fn templates_of_every_place_and_form() -> Result<()> {
        let chat = [Message::user(" Hi ")];
        let config = r#"{"eos_token": {"content": "</s>"}, "bos_token": null, "chat_template":
            [{"name": "tool_use", "template": "x"}, {"name": "default", "template":
            "{% for m in messages %}{{ m['content'].strip() }}{{ eos_token }}{% endfor %}"}]}"#;
        let several = folder(&[("tokenizer_config.json", config)]);
        assert_eq!(
            ChatTemplate::open(several.path())?.apply(&chat, false)?,
            "Hi</s>"
        );
        assert_eq!(
            eos_token_of_folder(several.path())?.as_deref(),
            Some("</s>")
        );
        // A file of its own goes first.
        let alone = "{%- if tools is not none %}tools{% endif -%}\n{{ messages[0].role }}";
        let both = folder(&[
            ("tokenizer_config.json", config),
            ("chat_template.jinja", alone),
        ]);
        assert_eq!(
            ChatTemplate::open(both.path())?.apply(&chat, false)?,
            "user"
        );
        Ok(())
    }

    /// As Jinja is set by transformers: a line with nothing but a block leaves nothing.
    #[test]
    fn lines_of_blocks_are_not_in_the_text() -> Result<()> {
        let jinja = "{% for m in messages %}\n  {% if m %}\n{{ m.content }},\n  {% endif %}\n\
                     {% endfor %}\nend";
        let chat = [Message::user("a"), Message::user("b")];
        let text = ChatTemplate::new(jinja, "", "")?.apply(&chat, false)?;
        assert_eq!(text, "a,\nb,\nend");
        Ok(())
    }

    #[test]
    fn what_is_no_template_is_refused() {
        let said = |files: &[(&str, &str)]| {
            let folder = folder(files);
            let template = ChatTemplate::open(folder.path());
            let chat = [Message::user("Hi")];
            template
                .and_then(|template| template.apply(&chat, true))
                .unwrap_err()
                .to_string()
        };
        assert!(said(&[]).contains("no chat template"));
        assert!(said(&[("tokenizer_config.json", "{")]).contains("tokenizer_config.json"));
        assert!(said(&[("chat_template.jinja", "{% for")]).contains("no Jinja"));
        let raises = "{{ raise_exception('roles must alternate') }}";
        assert!(said(&[("chat_template.jinja", raises)]).contains("roles must alternate"));
        let empty = folder(&[]);
        assert_eq!(eos_token_of_folder(empty.path()).unwrap(), None);
    }
}
