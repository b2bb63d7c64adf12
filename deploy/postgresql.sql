-- Roles and databases of Prefect's and MLflow's servers and of the assistant's record, made once by a superuser:
--   psql -h DATABASE -U postgres -v prefect_password=… -v mlflow_password=… -v rlhf_password=… -f deploy/postgresql.sql
\set ON_ERROR_STOP on
CREATE ROLE prefect LOGIN PASSWORD :'prefect_password';
CREATE DATABASE prefect OWNER prefect;
CREATE ROLE mlflow LOGIN PASSWORD :'mlflow_password';
CREATE DATABASE mlflow OWNER mlflow;
CREATE ROLE rlhf LOGIN PASSWORD :'rlhf_password';
CREATE DATABASE rlhf OWNER rlhf;
