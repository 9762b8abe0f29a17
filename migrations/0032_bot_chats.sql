-- Whether the appservice's user and who invited it are alone in a chat: everything that is said there is for it.
ALTER TABLE appservice_chats ADD COLUMN is_direct BIGINT NOT NULL DEFAULT 0;
