//! A real browser, Debian's Chromium, with the web client of `tests/web` in it: installed where it is missing, started for a scenario
//! and ended with it. What a scenario has it do is done as a person would do it, by what is seen on the page.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;

use super::testbed::client::http;
use super::testbed::packages::{self, run, say, succeeds};
use super::testbed::process::{Process, Program, free_port, target_dir};

/// The variable of the environment that says `none` where scenarios in a browser shall be left out.
const BROWSER: &str = "ISTHMUS_TEST_BROWSER";
/// The web client and what drives the browser.
const WEB: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/web");
/// Where messages are written.
const COMPOSER: &str = ".MessageComposer textarea";
/// How long one thing that is done or waited for may take; longer than the browser's own patience, so that it can say what was wrong.
const PATIENCE: Duration = Duration::from_secs(200);

/// A browser with the web client in it.
pub struct Browser {
    process: Process,
    http: reqwest::Client,
    url: String,
    /// Where screenshots go, and how many there are.
    shots: (PathBuf, u32),
}

impl Browser {
    /// Starts one for a scenario, whose screenshots go to `target/browser/SCENARIO/`. None, and a line that says so, where
    /// `ISTHMUS_TEST_BROWSER=none` asks for none.
    pub async fn start(scenario: &str) -> Result<Option<Self>> {
        if std::env::var(BROWSER).is_ok_and(|wanted| wanted == "none") {
            ensure!(std::env::var_os("CI").is_none(), "{BROWSER}=none is not for CI, which tests in a browser too");
            say(&format!("{BROWSER}=none: no scenario is played in a browser"));
            return Ok(None);
        }
        let packages = tokio::task::spawn_blocking(install)
            .await?
            .with_context(|| format!("a browser for tests ({BROWSER}=none leaves out what is played in one)"))?;
        let target = target_dir()?;
        let shots = target.join("browser").join(scenario);
        if shots.exists() {
            std::fs::remove_dir_all(&shots)?;
        }
        std::fs::create_dir_all(&shots)?;
        let profile = target.join("tmp").join(format!("browser-{}-{scenario}", std::process::id()));
        std::fs::create_dir_all(&profile)?;
        let port = free_port()?;
        let url = format!("http://127.0.0.1:{port}/");
        let process = Program::new("the browser", "node", &shots.join("browser.log"))
            .args([Path::new(WEB).join("drive.js"), packages])
            .args([port.to_string()])
            .args([chromium().context("Chromium is gone again")?, profile.clone(), shots.clone()])
            .remove_at_end(&profile)
            .start()?;
        let mut browser = Self { process, http: http(None)?, url, shots: (shots, 0) };
        let ready = async {
            while browser.http.get(&browser.url).send().await.is_err() {
                browser.process.check()?;
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            anyhow::Ok(())
        };
        let ready = tokio::time::timeout(Duration::from_secs(120), ready).await;
        ready.with_context(|| format!("no browser in two minutes:\n{}", browser.process.log_tail()))??;
        Ok(Some(browser))
    }

    /// Opens the client and logs a user in at the homeserver.
    pub async fn log_in(&mut self, homeserver: &str, user: &str, password: &str) -> Result<()> {
        self.act("open", "", "").await?;
        self.act("fill", "#homeserver", homeserver).await?;
        self.act("press", "#homeserver", "Tab").await?;
        self.act("fill", "#username", user).await?;
        self.act("fill", "#password", password).await?;
        self.shot("login").await?;
        self.click("button:text-is('Log In')").await?;
        self.see(".LeftPanel").await
    }

    /// Joins a room by its alias.
    pub async fn join(&mut self, alias: &str) -> Result<()> {
        self.click("button[aria-label='Create room']").await?;
        self.click(".menu button:text-is('Join Room')").await?;
        self.act("fill", ".JoinRoomView input", alias).await?;
        self.shot("join").await?;
        self.click(".JoinRoomView button:text-is('Join')").await?;
        self.see(COMPOSER).await
    }

    /// Waits until all of these are seen among the members of the room.
    pub async fn see_members(&mut self, names: &[&str]) -> Result<()> {
        self.click("button.room-options").await?;
        self.click(".menu button:text-is('Room details')").await?;
        self.click(".RoomDetailsView button:has-text('People')").await?;
        for name in names {
            self.see(&format!(".MemberTileView_name:text-is({})", quoted(name))).await?;
        }
        self.shot("members").await?;
        self.click(".RightPanelView .close").await
    }

    /// Writes a message.
    pub async fn say(&self, text: &str) -> Result<()> {
        self.act("fill", COMPOSER, text).await?;
        self.act("press", COMPOSER, "Enter").await
    }

    /// Writes a reply to the message in which `to` stands.
    pub async fn reply(&mut self, to: &str, text: &str) -> Result<()> {
        self.menu(to).await?;
        self.shot("menu").await?;
        self.click(".menu button:text-is('Reply')").await?;
        self.see(&format!(".MessageComposer_replyPreview:has-text({})", quoted(to))).await?;
        self.say(text).await
    }

    /// Reacts to the message in which `to` stands.
    pub async fn react(&self, to: &str, key: &str) -> Result<()> {
        self.menu(to).await?;
        self.click(&format!(".quick-reactions button:text-is({})", quoted(key))).await
    }

    async fn menu(&self, message: &str) -> Result<()> {
        let message = message_with(message);
        // Its button is there while the mouse is over it.
        self.act("hover", &format!("{message} .Timeline_messageBody"), "").await?;
        self.click(&format!("{message} button.Timeline_messageOptions")).await
    }

    /// Sends a picture from a file.
    pub async fn send_picture(&self, file: &Path) -> Result<()> {
        self.click("button.sendFile").await?;
        let file = file.to_str().context("the file's name is not text")?;
        self.act("choose", ".menu button:text-is('Send picture')", file).await
    }

    /// Waits until something is seen.
    pub async fn see(&self, selector: &str) -> Result<()> {
        self.act("wait", selector, "").await
    }

    /// Waits until a picture is seen, and not its frame alone.
    pub async fn see_picture(&self, selector: &str) -> Result<()> {
        self.act("picture", selector, "").await
    }

    /// Clicks on something.
    pub async fn click(&self, selector: &str) -> Result<()> {
        self.act("click", selector, "").await
    }

    /// Keeps what is seen now, and returns the picture's file.
    pub async fn shot(&mut self, name: &str) -> Result<PathBuf> {
        let (directory, number) = &mut self.shots;
        *number += 1;
        let name = format!("{number:02}-{name}");
        let file = directory.join(format!("{name}.png"));
        self.act("shot", "", &name).await?;
        Ok(file)
    }

    async fn act(&self, action: &str, at: &str, text: &str) -> Result<()> {
        let body = json!({ "action": action, "at": at, "text": text });
        let answer = self.http.post(&self.url).timeout(PATIENCE).json(&body).send().await?;
        let status = answer.status();
        if status.is_success() {
            return Ok(());
        }
        let (why, log) = (answer.text().await?, self.process.log_tail());
        bail!("{action} {at:?} {text:?}: {why}\nThe browser's log ends with:\n{log}")
    }
}

/// What finds the message in which `text` stands, other than as what it replies to.
pub fn message_with(text: &str) -> String {
    let text = quoted(text);
    format!("li.Timeline_message:not(.disabled):has-text({text}):not(:has(.ReplyPreviewView:has-text({text})))")
}

/// A text as it stands in what finds something on a page.
pub fn quoted(text: &str) -> String {
    format!("\"{}\"", text.replace('\\', "\\\\").replace('"', "\\\""))
}

/// Installs what is missing, and returns where the packages of Node.js are.
fn install() -> Result<PathBuf> {
    packages::install(&["nodejs", "npm"], has_node, &mut say)
        .context("it needs Node.js 20 or later and npm (in Debian `nodejs` and `npm`)")?;
    packages::install(&["chromium", "fonts-noto-color-emoji"], || chromium().is_some(), &mut say)
        .context("it needs Chromium, in Debian `chromium`")?;
    let directory = target_dir()?.join("web");
    std::fs::create_dir_all(&directory)?;
    let lock = File::create(directory.join("lock"))?;
    lock.lock().context("waiting for another process that installs the packages of Node.js")?;
    // What is there is what was asked for when it was installed.
    let (ready, wanted) = (directory.join("ready"), std::fs::read(Path::new(WEB).join("package-lock.json"))?);
    if std::fs::read(&ready).is_ok_and(|there| there == wanted) {
        return Ok(directory);
    }
    for name in ["package.json", "package-lock.json"] {
        std::fs::copy(Path::new(WEB).join(name), directory.join(name))?;
    }
    say(&format!("installing packages of Node.js in {}", directory.display()));
    let mut npm = Command::new("npm");
    npm.args(["ci", "--ignore-scripts", "--no-audit", "--no-fund", "--no-progress"]).current_dir(&directory);
    run(npm, &directory.join("npm.log"), &mut say).context("`npm ci`")?;
    std::fs::write(ready, wanted)?;
    Ok(directory)
}

/// Whether there is a Node.js that is new enough, and npm.
fn has_node() -> bool {
    let new_enough = "process.exit(Number(process.versions.node.split('.')[0]) >= 20 ? 0 : 1)";
    succeeds(Command::new("node").args(["-e", new_enough])) && succeeds(Command::new("npm").arg("--version"))
}

/// Where Chromium is.
fn chromium() -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|bin| bin.join("chromium")).find(|program| program.exists())
}
